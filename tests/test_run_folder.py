"""Runs that start from a checkpoint of another, as ReLoRA does after a run of all weights."""

import json
import shutil
import subprocess
import sys

import jax
import launch
import numpy as np
import pytest

from memjax import adapters, build, checkpoint, models, pretrained, run_folder, sharding
from memjax import config as config_lib
from memjax.train import load_data, place, train

RELORA = str(launch.ROOT / 'configs/relora_llama350m.py')


def one_device(c, directory):
  return train(c, directory, devices=jax.devices()[:1])


def full_config(**fields):
  c = config_lib.load(str(launch.ROOT / 'configs/adamw_llama350m.py:smoke'))
  c.update(dict(steps=2, eval_every=0, **fields))
  c.sample.tokens, c.checkpoint.every = 0, 1
  return c


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  """The work directory of a run of all weights, with checkpoints of both its updates."""
  directory = tmp_path_factory.mktemp('runs') / 'full'
  one_device(full_config(), directory)
  return directory


def read(checkpoints, step):
  """Parameters of a checkpoint by path, as orbax reads them."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as opened:
    tree = opened.restore((checkpoints / str(step) / 'state').absolute())['params']
  return jax.device_get(tree)


def begun(c, **axes):
  """Parameters before the first update."""
  devices = None if axes else jax.devices()[:1]
  parts = build.build(c, sharding.make_mesh(**axes, devices=devices))
  return parts, parts.init(build.root_key(c, 'params'))['params']


def assert_equal(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs
  )


@pytest.mark.parametrize(('where', 'step'), [('', 2), ('checkpoints/1', 1)])
def test_relora_begins_at_exactly_the_weights_of_the_run_before_it(where, step, full):
  c = config_lib.load(f'{RELORA}:smoke,warm={full / where}')
  parts, params = begun(c)
  expected = read(full / 'checkpoints', step)
  other = read(full / 'checkpoints', 3 - step)
  assert (expected['head']['kernel'] != other['head']['kernel']).any()
  kernel = params['blocks']['mlp']['up']['kernel']
  assert (kernel.base.dtype, not np.asarray(kernel.b).any()) == ('bfloat16', True)
  # B is zero: what is added is nothing.
  assert_equal(jax.tree.map(base, params, is_leaf=is_adapted), expected)
  assert (parts.model.vocab, pretrained.tokenizer(c)) == (512, 'bytes')


def is_adapted(leaf):
  return hasattr(leaf, 'delta')


def base(leaf):
  return leaf.base if is_adapted(leaf) else leaf


def test_the_first_loss_is_that_of_the_full_rank_weights(full, tmp_path):
  c = config_lib.load(f'{RELORA}:smoke,warm={full}')
  c.update(dict(steps=1, eval_every=0, log_every=1))
  c.sample.tokens, c.adapter.dropout = 0, 0.0
  one_device(c, tmp_path / 'relora')
  second = launch.losses(tmp_path / 'relora')
  parts, params = begun(c)
  rows = load_data(c, parts.model).train.rows(0, 16, 0, 16, c.seed)
  batch = {k: v.reshape(2, 8, -1) for k, v in rows.items()}
  sums = [
    parts.eval_step(
      adapters.at_rest(params),
      place(lambda a, b, i=i: {k: v[i][a:b] for k, v in batch.items()}, parts.eval_batch),
    )
    for i in range(2)
  ]
  total, count = np.sum(np.asarray(sums), 0)
  np.testing.assert_allclose(list(second.values()), [total / count], rtol=2e-3)
  cold = launch.losses(full)
  assert next(iter(second.values())) < next(iter(cold.values())) - 0.05


def test_weights_are_read_onto_any_mesh_and_in_the_dtype_of_the_config(full):
  c = config_lib.load(f'{RELORA}:smoke,warm={full}')
  c.adapter, c.param_dtype = config_lib.adapter('none'), 'float32'
  parts, params = begun(c, data=2, fsdp=2, tensor=2)
  expected = read(full / 'checkpoints', 2)
  assert_equal(params, jax.tree.map(lambda x: x.astype(np.float32), expected))
  same = lambda x, shape: x.sharding.is_equivalent_to(shape.sharding, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, params, parts.state['params'])))


def test_a_folder_that_is_no_such_run_is_refused(full, tmp_path):
  warm = lambda path: config_lib.load(f'{RELORA}:smoke,warm={path}')
  with pytest.raises(ValueError, match='neither the work directory of a run nor a checkpoint'):
    warm(tmp_path / 'nowhere')
  (tmp_path / 'empty/checkpoints').mkdir(parents=True)
  with pytest.raises(ValueError, match='a run without a checkpoint; train it first'):
    warm(tmp_path / 'empty')
  models.save(tmp_path / 'folder', *tiny())
  with pytest.raises(ValueError, match='or name a Hugging Face folder as config'):
    warm(tmp_path / 'folder')
  with pytest.raises(ValueError, match=r"a run of 'llama_tiny', and this one is of 'llama_350m'"):
    config_lib.load(f'{RELORA}:warm={full}')
  for fields, error in (
    (dict(adapter=dict(name='lora')), r"config.adapter.name='lora', not of one that trains all"),
    (dict(weights='int8'), r"config.weights='int8', not of one that trains all"),
    (dict(step='hybrid'), r"config.step='hybrid', which keeps its layers in two parts"),
  ):
    with pytest.raises(ValueError, match=error):
      warm(edited(full, tmp_path / 'other', **fields))


def tiny():
  model = models.Llama(vocab=32, hidden=16, intermediate=24, heads=2, kv_heads=2, layers=1)
  return model, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.abstract())


def edited(full, copy, **fields):
  """A copy of a run whose last checkpoint says another config."""
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(full, copy)
  file = copy / 'checkpoints/2/metadata/metadata'
  record = json.loads(file.read_text())
  record['metadata']['config'] |= fields
  record['crc32'] = checkpoint._crc32(record['metadata'], record['leaves'])
  file.write_text(json.dumps(record))
  return copy


def test_another_models_checkpoint_names_the_leaf(full):
  c = config_lib.load(f'{RELORA}:smoke,warm={full}')
  c.model_args.hidden, c.model_args.heads = 32, 2
  with pytest.raises(ValueError, match=r'full/checkpoints/2: params/.* has shape .* there and'):
    begun(c)


def test_a_damaged_checkpoint_is_refused(full, tmp_path):
  copy = edited(full, tmp_path / 'full')
  file = copy / 'checkpoints/2/metadata/metadata'
  record = json.loads(file.read_text())
  record['leaves']['params/head/kernel']['digest'] ^= 1
  file.write_text(json.dumps(record))
  with pytest.raises(ValueError, match='metadata does not match its checksum'):
    config_lib.load(f'{RELORA}:smoke,warm={copy}')
  record['crc32'] = checkpoint._crc32(record['metadata'], record['leaves'])
  file.write_text(json.dumps(record))
  with pytest.raises(ValueError, match='damaged: params/head/kernel does not match its digest'):
    begun(config_lib.load(f'{RELORA}:smoke,warm={copy}'))


def test_the_tokenizer_is_that_runs(full, tmp_path):
  run = run_folder.find(full).config.to_dict()
  copy = edited(full, tmp_path / 'full', data=run['data'] | {'tokenizer': 'bpe'})
  c = config_lib.load(f'{RELORA}:smoke,warm={copy}')
  c.data.tokenizer = 'bpe'
  assert pretrained.tokenizer(c) == 'bpe'
  c.data.sources = ('text:*.py',)
  with pytest.raises(ValueError, match=r"was trained on config.data.sources=\('stdlib',\)"):
    pretrained.tokenizer(c)


def test_to_look_at_a_run_begins_no_backend(full):
  """Else hosts could no longer join, nor a CPU be split, when the config is there."""
  code = (
    'import jax; from memjax import config; config.load(f"{0}:smoke,warm={1}");'
    'jax.config.update("jax_num_cpu_devices", 2)'
  )
  code = code.replace('{0}', RELORA).replace('{1}', str(full))
  subprocess.run([sys.executable, '-c', code], check=True, cwd=launch.ROOT)
