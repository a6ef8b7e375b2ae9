"""Runs that start from a checkpoint: what they hold before the first update, what is refused."""

import contextlib
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from memjax import build, models, pretrained, sharding, train, weights
from memjax import config as config_lib
from memjax.data.tokenizers import open_tokenizer, train_bpe

SIZES = dict(vocab=300, hidden=32, intermediate=48, heads=4, kv_heads=2, layers=2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A LLaMA with a tokenizer of its own."""
  path = tmp_path_factory.mktemp('pretrained') / 'llama'
  model = models.Llama(**SIZES, rope_theta=500.0)
  rng = np.random.default_rng(0)
  draw = lambda leaf: np.float32(0.3 * rng.standard_normal(leaf.shape))
  models.save(path, model, jax.tree.map(draw, model.abstract()))
  text = train_bpe([f'{i} times' for i in range(50)], 290)
  (path / 'tokenizer.json').write_text(text)
  return path


def config_of(folder, **fields) -> ConfigDict:
  c = config_lib.default()
  c.load = str(folder)
  c.model_args.loss_chunk = 64
  c.seq_len = 8
  for name, value in fields.items():
    c[name] = value
  return c


def start(c, **axes):
  """The parts of a run, and its state before the first update, on one device unless said."""
  devices = None if axes else jax.devices()[:1]
  parts = build.build(c, sharding.make_mesh(**axes, devices=devices))
  return parts, parts.init(build.root_key(c, 'params'))


def assert_equal(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs
  )


def dense(params):
  return jax.tree.map(weights.materialize, params, is_leaf=weights.is_weight)


def test_a_run_starts_from_the_parameters_of_the_folder_where_they_belong(folder):
  parts, state = start(config_of(folder), data=2, fsdp=2, tensor=2)
  assert (parts.model.vocab, parts.model.rope_theta, parts.model.loss_chunk) == (300, 500.0, 64)
  assert_equal(state['params'], models.load(folder)[1])
  same = lambda x, shape: x.sharding.is_equivalent_to(shape.sharding, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, state['params'], parts.state['params'])))
  assert not state['params']['head']['kernel'].is_fully_replicated


def test_an_adapter_attaches_to_what_was_loaded(folder):
  c = config_of(folder)
  c.adapter = config_lib.adapter('lora', rank=2)
  _, state = start(c)
  _, expected = models.load(folder)
  q = state['params']['blocks']['attn']['q']['kernel']
  assert isinstance(q, weights.Adapted)
  # B is zero, so that the function is the loaded one.
  assert_equal(dense(state['params']), expected)
  assert weights.trained(state['params'])['embed'] == {'embedding': None}


def test_matrices_are_quantised_as_drawn_ones_are(folder):
  c = config_of(folder, weights='int8', step='layerwise', remat='full')
  _, state = start(c)
  _, expected = models.load(folder)
  up = state['params']['blocks']['mlp']['up']['kernel']
  assert isinstance(up, weights.Int8)
  assert_equal(up, jax.lax.map(weights.quantise, expected['blocks']['mlp']['up']['kernel']))
  assert_equal(state['params']['embed'], expected['embed'])


def test_a_streamed_run_reads_into_host_memory(folder):
  c = config_of(folder, step='streamed', remat='full')
  c.optimizer = config_lib.optimizer('mezo', learning_rate=1e-6)
  _, state = start(c)
  _, expected = models.load(folder)
  assert state['params']['blocks']['mlp']['up']['kernel'].sharding.memory_kind == 'pinned_host'
  assert_equal(state['params'], expected)


def test_parameters_take_the_dtype_of_the_config(folder):
  c = config_of(folder, param_dtype='bfloat16')
  parts, state = start(c)
  assert parts.model.dtype == 'float32'
  _, expected = models.load(folder, 'bfloat16')
  assert_equal(state['params'], expected)


def test_a_run_trains_what_it_loaded_with_its_tokenizer(folder, tmp_path):
  rows = ''.join(json.dumps({'text': f'{i} times'}) + '\n' for i in range(200))
  (tmp_path / 'rows.jsonl').write_text(rows)
  c = config_of(folder, steps=1, batch_size=4, eval_every=0, log_every=1)
  c.data.sources = (f'jsonl:{tmp_path}/rows.jsonl:text',)
  c.data.cache_dir = str(tmp_path / 'cache')
  c.data.validation_fraction = 0.5
  c.sample.tokens = 0
  c.export = True
  assert pretrained.tokenizer(c) == str(folder / 'tokenizer.json')
  done = train.train(c, tmp_path / 'run', devices=jax.devices()[:1])
  model, params = models.load(folder)
  rows = train.load_data(c, model).train.rows(0, 4, 0, 4, c.seed)
  total, count = jax.jit(model.loss)(params, rows)
  lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  # The same arithmetic, fused differently.
  np.testing.assert_allclose(lines[0]['train/loss'], total / count, rtol=1e-5)
  assert_equal(models.load(tmp_path / 'run/model-1')[1], done['state']['params'])
  assert (tmp_path / 'run/model-1/tokenizer.json').exists()
  head = np.asarray(done['state']['params']['head']['kernel'])
  assert (head != np.asarray(params['head']['kernel'])).any()


def test_a_tokenizer_with_more_pieces_than_the_vocabulary_is_refused(folder, tmp_path):
  small = tmp_path / 'small'
  model = models.Llama(**SIZES | {'vocab': 270})
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.abstract())
  models.save(small, model, zeros)
  c = config_of(small)
  c.data.cache_dir = str(tmp_path / 'cache')
  with pytest.raises(ValueError, match=r'has neither tokenizer.json nor tokenizer.model; copy one'):
    train.load_data(c, model)
  (small / 'vocab.json').write_text('{}')
  with pytest.raises(ValueError, match=r'or make one of vocab.json: python -c .* AutoTokenizer'):
    train.load_data(c, model)
  (small / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text())
  with pytest.raises(
    ValueError, match=r"small/tokenizer.json' has token ids up to 2\d\d.* of 270; set"
  ):
    train.load_data(c, model)
  c.data.tokenizer = 'bytes'
  assert pretrained.tokenizer(c) == 'bytes'


@pytest.mark.parametrize(
  ('fields', 'pieces', 'said'),
  [
    ({'eos_token_id': 0}, 290, None),
    ({'eos_token_id': None}, 290, None),
    ({'eos_token_id': [7, 0]}, 290, None),
    (
      {'eos_token_id': 2},
      290,
      r"tokenizer\.json' is not that of .*config\.json: 'eos_token_id' 2 is",
    ),
    ({'vocab_size': 350}, 260, "its 260 ids are too few for 'vocab_size' 350"),
  ],
)
def test_the_tokenizer_of_another_model_is_refused(folder, tmp_path, fields, pieces, said):
  config = json.loads((folder / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | fields))
  text = train_bpe([f'{i} times' for i in range(50)], pieces)
  (tmp_path / 'tokenizer.json').write_text(text)
  opened = open_tokenizer(
    str(tmp_path / 'tokenizer.json'), None, vocab_size=300, cache_dir=tmp_path
  )
  raises = contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said)
  with raises:
    pretrained.check_tokenizer(config_of(tmp_path), opened, fields.get('vocab_size', 300))


def test_a_folder_that_is_not_there_is_refused_before_anything_is_allocated(tmp_path):
  with pytest.raises(ValueError, match='there is no folder'):
    build.build(config_of(tmp_path / 'nowhere'), sharding.make_mesh())
