"""The published choices, as the config files of tasks make them."""

import pathlib

import jax
import numpy as np
import pytest

from memjax import build, models, sharding, weights
from memjax import config as config_lib
from memjax.naming import path_string
from memjax.tasks import recipes

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def load(spec):
  return config_lib.load(f'{CONFIGS}/{spec}')


@pytest.mark.parametrize('task', recipes.MEZO_LENGTHS)
def test_mezos_tasks(task):
  """arXiv 2305.17333, tables 15 and 16 and appendix E, and its script."""
  c = load(f'mezo_opt.py:size=30b,task={task}')
  o, t = c.optimizer, c.task
  assert (c.model, c.step, o.name) == ('opt_30b', 'zeroth_order', 'mezo')
  assert (o.learning_rate, o.eps, o.weight_decay) == (1e-6, 1e-3, 0)
  assert (c.batch_size, c.steps, c.eval_every, c.schedule.name) == (16, 20_000, 4000, 'constant')
  dev = 100 if task in ('cb', 'copa') else 500
  assert (t.examples, t.dev_examples, t.test_examples, t.seed) == (1000, dev, 1000, 0)
  by_tokens = task in ('copa', 'record', 'squad', 'drop')
  assert t.loss == ('tokens' if by_tokens else 'options')
  assert t.prefix == '0'


def test_mezos_adapters():
  c = load('mezo_opt.py:adapter=lora')
  assert (c.adapter.rank, c.adapter.alpha, c.adapter.rest) == (8, 16.0, '')
  assert (c.optimizer.learning_rate, c.optimizer.eps) == (1e-4, 1e-2)


@pytest.mark.parametrize(
  ('spec', 'rate', 'scale', 'batch', 'steps'),
  [
    ('task=mrpc', 3e-5, 4.0, 16, 30 * 3668 // 16),
    ('task=cola', 3e-5, 4.0, 32, 30 * 8551 // 32),
    ('task=rte', 1e-5, 4.0, 16, 30 * 2490 // 16),
    ('task=rte,rank=8', 2e-5, 2.0, 16, 30 * 2490 // 16),
    ('task=stsb,rank=8', 3e-5, 2.0, 16, 30 * 5749 // 16),
  ],
)
def test_galore_on_glue(spec, rate, scale, batch, steps):
  """arXiv 2403.03507, table 7, and its README."""
  c = load(f'glue.py:{spec}')
  o = c.optimizer
  assert (o.name, o.learning_rate, o.scale, o.refresh_every) == ('galore', rate, scale, 500)
  assert (c.model, c.batch_size, c.steps, c.seq_len) == ('roberta_base', batch, steps, 512)


def test_any_method_by_name():
  assert load('glue.py:method=lora').adapter.rest == 'head/.*'  # A new head is trained in full.
  for model in ('llama_tiny', 'opt_tiny'):  # Its head is its own, or the embedding.
    c = load(f'glue.py:method=lora,model={model}')
    state = build.build(c, sharding.make_mesh(devices=jax.devices()[:1])).state
    trained = jax.tree.leaves_with_path(weights.trained(state['params']))
    assert {path_string(path)[-1] for path, _ in trained} == {'a', 'b'}
  c = load('glue.py:method=lozo,model=llama_tiny')
  # GaLore's scale is a number, LOZO's a word.
  assert (c.step, c.optimizer.rank, c.optimizer.scale) == ('zeroth_order', 4, 'paper')
  c = load('instruct.py:method=apollo_mini')
  assert (c.optimizer.name, c.adapter.name) == ('apollo_mini', 'none')
  assert load('glue.py:model=some/folder').load == 'some/folder'


def test_a_folder_says_whether_it_has_a_new_head(tmp_path):
  for name, rest in (('bert_tiny', 'head/.*'), ('llama_tiny', '')):
    model = models.create(name)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.abstract())
    models.save(tmp_path / name, model, zeros)
    assert load(f'glue.py:method=dora,model={tmp_path / name}').adapter.rest == rest


def test_colms_instructions():
  c = load('instruct.py:train=a.jsonl')
  assert (c.adapter.name, c.adapter.rank, c.adapter.alpha) == ('lora', 128, 512.0)
  assert (c.optimizer.learning_rate, c.schedule.warmup_ratio, c.seq_len) == (2e-5, 0.03, 512)
  assert c.task.dev_examples == 500


def test_an_unknown_task_or_method_is_refused():
  with pytest.raises(ValueError, match="no task 'sst3' among cola"):
    load('glue.py:task=sst3')
  with pytest.raises(ValueError, match="no task 'mrpc' among sst2"):
    load('mezo_opt.py:task=mrpc')
  with pytest.raises(ValueError, match="the nearest is 'galore'"):
    load('glue.py:method=gallore')
