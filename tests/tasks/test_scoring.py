"""Scores of options against the obvious loop: one row, one token at a time, all logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import words

from memjax import tasks
from memjax.models import create
from memjax.tasks import prompts, scoring


def random_params(model):
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
  return jax.tree.map(draw, model.abstract())


@pytest.fixture(scope='module')
def setup():
  model = create('llama_tiny', vocab=64, hidden=16, intermediate=24, heads=2, kv_heads=1)
  params = random_params(model)
  task = tasks.find('copa')

  def make(times, a, b):
    row = dict(premise='p ' * times, question='cause', choice1=a, choice2=b, label=0)
    return tasks.example(task, *task.prepare(row), '')

  examples = [make(2, 'x y z', 'x'), make(9, 'y', 'z z'), make(1, 'u', 'v w')]
  return model, params, prompts.Prompter(task, words.tokenizer((63,)), 17), examples


def naive(logits, row):
  tokens = jnp.zeros((1, 20), jnp.int32).at[0, : len(row.tokens)].set(jnp.asarray(row.tokens))
  table = np.asarray(jax.nn.log_softmax(logits(tokens)[0]), np.float64)
  ids = row.tokens
  return [table[i - 1, ids[i]] for i in range(len(ids) - row.option, len(ids))]


@pytest.mark.parametrize('lengths', [True, False])
def test_scores_equal_a_loop_over_tokens(setup, lengths):
  model, params, prompter, examples = setup
  task = dataclasses.replace(prompter.task, lengths=lengths)
  prompter = prompts.Prompter(task, prompter.tokenizer, prompter.length)
  logits = jax.jit(functools.partial(model.logits, params))
  score = functools.partial(scoring.log_likelihood, model, params)
  # Four rows at a time: six rows end in the middle of a batch and of an example.
  got = scoring.option_scores(score, prompter, examples, 4)
  for example, scores in zip(examples, got):
    parts = [naive(logits, prompter.row(example, o)) for o in range(2)]
    expected = [np.mean(p) if lengths else np.sum(p) for p in parts]
    # f32 logits of size 1: sums of a few differ by their rounding.
    np.testing.assert_allclose(scores, expected, atol=2e-5)
  assert len({len(prompter.row(e, 0).tokens) for e in examples}) > 1


def test_scores_stop_when_asked(setup):
  _, _, prompter, examples = setup
  assert scoring.option_scores(None, prompter, examples, 4, stop=lambda: True) is None


def test_lengths_are_few():
  assert [scoring.rounded(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
