"""Tasks from a config to a score: training, evaluation beside the loss, and of what is on disk."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import words

import memjax
from memjax import config as config_lib
from memjax import metrics, tasks
from memjax.data.tokenizers import Frame, open_tokenizer
from memjax.models import create
from memjax.tasks import evaluation, made_up, prompts, report
from memjax.tasks.options import Choosing
from memjax.tasks.splits import Framed, Optioned, Prompted
from memjax.train import train

GLUE = pathlib.Path(__file__).parents[2] / 'configs' / 'glue.py'
SMALL = dict(vocab=260, hidden=16, intermediate=24, heads=2, layers=1)


def random_params(model):
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
  return jax.tree.map(draw, model.abstract())


def examples(task, count):
  return [tasks.example(task, made_up.row(task, i), '') for i in range(count)]


def options(count, seq_len=32):
  task = tasks.find('sst2')
  tokenizer = open_tokenizer('bytes', None, vocab_size=260, cache_dir=None)
  prompter = prompts.Prompter(task, tokenizer, seq_len + 1)
  return Optioned(examples(task, count), prompter=prompter, seq_len=seq_len)


@pytest.fixture(scope='module')
def choosing():
  return Choosing(create('llama_tiny', **SMALL, kv_heads=1, remat='none'), options=2)


def naive_losses(choosing, params, batch):
  """From all logits, in f64: the cross-entropy of options by their mean log-probability."""
  rows = batch['labels'].shape[0]
  logits = jax.jit(choosing.decoder.logits)(params, batch['tokens'].reshape(2 * rows, -1))
  table = np.asarray(jax.nn.log_softmax(logits), np.float64).reshape(rows, 2, -1, 260)
  chosen = np.take_along_axis(table, batch['targets'][..., None], axis=-1)[..., 0]
  scores = (chosen * batch['places']).sum(-1) / batch['places'].sum(-1)
  return np.logaddexp(*scores.T) - scores[np.arange(rows), batch['labels']]


@pytest.mark.slow
def test_training_on_options_reads_the_clue(choosing):
  """The loss is the one of the paper, and falls from chance to certainty on rows held out."""
  optimizer = optax.adam(0.02)

  @jax.jit
  def step(params, state, batch):
    loss = lambda p: (lambda total, count: total / count)(*choosing.loss(p, batch))
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  split = options(40)
  held_out = dataclasses.replace(split, examples=split.examples[32:])
  split = dataclasses.replace(split, examples=split.examples[:32])
  params = random_params(choosing)
  batch = split.rows(0, 16, 0, 16, 0)
  value = step(params, optimizer.init(params), batch)[2]
  # f32 sums of some 20 terms.
  np.testing.assert_allclose(value, naive_losses(choosing, params, batch).mean(), rtol=1e-5)
  partly = batch | {'weights': np.float32([1] * 3 + [0] * 13)}
  value = step(params, optimizer.init(params), partly)[2]
  np.testing.assert_allclose(value, naive_losses(choosing, params, batch)[:3].mean(), rtol=1e-5)

  params = jax.tree.map(lambda x: x / 10, params)
  state, losses = optimizer.init(params), []
  for i in range(40):
    params, state, value = step(params, state, split.rows(i, 16, 0, 16, 0))
    losses.append(float(value))
  assert losses[0] > 0.5
  assert losses[-1] < 0.1
  task = split.prompter.task
  assert tasks.measure(choosing, params, task, held_out, 8) == {'accuracy': 1.0}


def test_options_longer_than_the_head_reads_are_refused():
  split = options(1, seq_len=64)
  task = dataclasses.replace(split.prompter.task, words=('no', 'extraordinarily good'))
  prompter = dataclasses.replace(split.prompter, task=task)
  split = Optioned(examples(task, 1), prompter=prompter, seq_len=64)
  with pytest.raises(ValueError, match=r"an option of 21 tokens.*config\.task\.loss='tokens'"):
    split.eval_rows(0, 1, 0, 1)


def test_answers_are_the_likeliest_tokens_up_to_the_stop(choosing):
  model = choosing.decoder
  params = random_params(model)
  task = dataclasses.replace(tasks.find('squad'), new_tokens=4)
  tokenizer = words.tokenizer((63,))._replace(decode=lambda ids: ' '.join(map(str, ids)))
  prompter = prompts.Prompter(task, tokenizer, 40)
  rows = [dict(title='t ' * i, context='c', question='q', answers=['7']) for i in (1, 5, 2)]
  split = Prompted([tasks.example(task, r, '') for r in rows], prompter=prompter, seq_len=39)
  got = tasks.predict(model, params, task, split, 2)

  likeliest = jax.jit(lambda tokens: model.logits(params, tokens)[0].argmax(-1))
  for example, text in zip(split.examples, got):
    tokens = prompter.prompt(example, 5)
    expected = []
    while len(expected) < 4:
      padded = jnp.zeros((1, 40), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
      tokens = [*tokens, int(likeliest(padded)[len(tokens) - 1])]
      if tokens[-1] in evaluation.stop_tokens(prompter):
        break
      expected.append(tokens[-1])
    assert text == ' '.join(map(str, expected))
  assert len(set(got)) > 1
  assert tasks.predict(model, params, task, split, 2, stop=lambda: True) is None


def test_an_answer_ends_at_its_stop_inside_a_token():
  task = tasks.find('squad')
  tokenizer = words.tokenizer()._replace(decode=lambda ids: ''.join(map(chr, ids)))
  prompter = prompts.Prompter(task, tokenizer, 8)
  ends = np.array([3, 0])
  assert evaluation.answer_text(prompter, [32, 65, 66, 3, 67], ends) == 'AB'
  assert evaluation.answer_text(prompter, [65, 10, 66], ends) == 'A'


def test_an_encoder_reads_its_head():
  task = tasks.find('mnli')
  model = create('bert_tiny', **SMALL, **tasks.head_fields(task))
  params = jax.tree.map(lambda x: 4 * x, random_params(model))
  tokenizer = open_tokenizer('bytes', None, vocab_size=260, cache_dir=None)
  tokenizer = tokenizer._replace(frame=Frame((257,), (258,), (258,)))
  split = Framed(examples(task, 5), tokenizer=tokenizer, seq_len=24)
  got = tasks.predict(model, params, task, split, 4)
  batch = split.eval_rows(0, 8, 0, 8)
  rows = batch['tokens'], batch['attention_mask'], batch['token_types']
  logits = jax.jit(model.logits)(params, *rows)
  assert got == logits.argmax(-1).tolist()[:5]
  assert len(set(got)) > 1


def test_a_number_by_prompt_is_the_mean_over_its_words():
  assert evaluation._expected(np.log([0.1, 0.2, 0.7])) == pytest.approx(0.2 + 1.4)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """`configs/glue.py:smoke`, of a smaller model."""
  directory = tmp_path_factory.mktemp('glue')
  c = config_lib.load(f'{GLUE}:smoke,method=adamw').unlock()
  c.model_args.layers, c.model_args.hidden, c.model_args.intermediate = 1, 16, 16
  result = train(c, directory, devices=jax.devices()[:2])
  return directory, result


@pytest.mark.slow
def test_scores_stand_beside_the_validation_loss(run):
  directory, result = run
  lines = [line for line in metrics.read(directory) if 'eval/loss' in line]
  assert [line['step'] for line in lines] == [2, 4]
  assert all(0 <= line['eval/accuracy'] <= 1 for line in lines)
  assert all(line['eval/tokens'] == 8 for line in lines)  # Examples, of an encoder.
  assert result['eval/accuracy'] == lines[-1]['eval/accuracy']
  assert json.loads((directory / 'data.json').read_text())['train_examples'] == 32


def test_a_run_is_measured_from_its_checkpoint(run):
  directory, result = run
  fields = {'test': 'made_up:8:32', 'train': 'nowhere.jsonl'}  # Where it trained, not here.
  found = memjax.evaluate(directory, {'sst2': fields}, devices=jax.devices()[:1])
  assert found['tasks']['sst2']['accuracy'] == result['eval/accuracy']
  assert (found['step'], found['tasks']['sst2']['examples']) == (4, 8)
  assert json.loads((directory / 'evaluation.json').read_text()) == found
  assert 'sst2: accuracy' in tasks.show(found)


def test_the_batches_of_a_measurement_need_not_be_those_of_a_step(run, tmp_path, monkeypatch):
  """Micro-batches are measured on; and a run that chooses 8 rows of each 8 on 4 at a time."""
  rows = []
  monkeypatch.setattr(report, 'measure', lambda *args: rows.append(args[-1]) or {})
  shutil.copytree(run[0], tmp_path / 'run')
  file = tmp_path / 'run/config.json'
  own = json.loads(file.read_text())
  own['select'].update(name='random', keep=8)
  file.write_text(json.dumps(own))
  c = config_lib.load(f'{GLUE}:smoke,method=adamw').unlock()
  for c.batch_size, c.accumulate in ((4, 1), (8, 4)):
    memjax.evaluate(tmp_path / 'run', config=c, devices=jax.devices()[:1])
  assert rows == [4, 2]
  with pytest.raises(ValueError, match='2 sequences does not divide over data x fsdp = 8 devices'):
    memjax.evaluate(tmp_path / 'run', config=c, devices=jax.devices()[:8])


def test_what_cannot_be_measured_is_refused(run, tmp_path):
  with pytest.raises(ValueError, match=r'not the work directory of a run.*--config='):
    memjax.evaluate(tmp_path)
  with pytest.raises(ValueError, match='there is no task to measure on; name one'):
    memjax.evaluate(run[0], {})
  with pytest.raises(ValueError, match='needs labels=3, but the model has 2'):
    memjax.evaluate(run[0], {'mnli': {'test': 'made_up:4'}}, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r"to measure 'sst2': config\.task has no field 'tets'"):
    memjax.evaluate(run[0], {'sst2': {'tets': 'made_up:4'}})


@pytest.mark.slow
def test_the_command_measures_a_run(run):
  directory, _ = run
  command = [sys.executable, 'run.py', f'--evaluate={directory}']
  done = subprocess.run(command, cwd=GLUE.parents[1], capture_output=True, text=True, check=True)
  assert 'sst2: accuracy' in done.stdout
  found = json.loads((directory / 'evaluation.json').read_text())
  assert found['tasks']['sst2']['file'] == 'made_up:8:40'
