"""Runs that leave a folder of `peft`, and runs that go on from one."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax import adapters, build, models, peft_folder, sharding, train
from memjax import config as config_lib

SIZES = dict(vocab=300, hidden=16, intermediate=24, heads=2, kv_heads=2, layers=2)
QUERIES = 'attn/(q|v)/'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  rows = ''.join(json.dumps({'text': f'{i} times {i}'}) + '\n' for i in range(200))
  (path / 'rows.jsonl').write_text(rows)
  return path


def config_of(data, adapter=None, **fields):
  """Of two updates at a model drawn from the seed."""
  c = config_lib.default()
  c.model, c.seq_len, c.batch_size, c.steps = 'llama_tiny', 8, 4, 2
  c.model_args = dict(loss_chunk=64, **SIZES)
  c.data.sources = (f'jsonl:{data}/rows.jsonl:text',)
  c.data.cache_dir, c.data.tokenizer = str(data / 'cache'), 'bytes'
  c.data.validation_fraction = 0.5
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config_lib.optimizer('adamw', learning_rate=0.05)
  c.log_every, c.eval_every, c.sample.tokens = 1, 0, 0
  if adapter:
    c.adapter = config_lib.adapter(**adapter)
  c.update(fields)
  return c


def one_device(c, directory):
  return train.train(c, directory, devices=jax.devices()[:1])


def parts_of(c):
  return build.build(c, sharding.make_mesh(devices=jax.devices()[:1]))


def begun(c):
  """Parameters before the first update."""
  return parts_of(c).init(build.root_key(c, 'params'))['params']


def losses(directory):
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['train/loss'] for line in lines]


def assert_equal(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs
  )


KINDS = {
  'lora': dict(name='lora', rank=4, alpha=8.0, targets=QUERIES),
  'rslora': dict(name='lora', rank=4, alpha=3.0, rank_stabilized=True),
  'dora': dict(name='dora', rank=2, alpha=5.0, targets='mlp/'),
  'flat_lora': dict(name='flat_lora', rank=2, targets=QUERIES, dropout=0.1),
}


@pytest.fixture(scope='module')
def folders(data, tmp_path_factory):
  """Kind -> the folder that a run of two updates left, and its last parameters."""
  found = {}

  def of(kind):
    if kind not in found:
      c = config_of(data, KINDS[kind])
      c.adapter.export = True
      directory = tmp_path_factory.mktemp(kind)
      done = one_device(c, directory)
      found[kind] = directory / 'adapter-2', done['state']['params']
    return found[kind]

  return of


def going_on(data, folder, **fields):
  """The config of a run with nothing else said of adapters."""
  c = config_of(data, **fields)
  c.adapter.load = str(folder)
  return c


@pytest.mark.parametrize(
  'kind',
  [k if k in ('lora', 'dora') else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_a_run_goes_on_from_the_factors_that_another_left(kind, data, folders):
  folder, trained = folders(kind)
  c = going_on(data, folder)
  if kind == 'flat_lora':  # Else it is a LoRA from now on.
    assert peft_folder.resolved(c).adapter.name == 'lora'
    c.adapter = config_lib.adapter('flat_lora', load=str(folder), dropout=0.1)
  params = begun(c)
  values = adapters.trainable(params)
  assert_equal(values, adapters.trainable(trained))
  moved = jax.tree.leaves(jax.tree.map(lambda x: np.abs(x).max() > 0, values))
  assert all(moved)
  # The same function: of equal factors, equal scales and equal weights beneath.
  merged = lambda params: jax.jit(adapters.merge)(adapters.at_rest(params))
  assert_equal(merged(params), merged(trained))


def test_the_first_loss_is_that_of_the_update_which_did_not_come(data, folders, tmp_path):
  """Two updates, then a folder and a second run, whose first loss is the third of an unbroken run
  on the same rows.
  """
  folder, trained = folders('lora')
  c = going_on(data, folder, steps=1)
  c.adapter.export = True
  one_device(c, tmp_path / 'second')
  parts = parts_of(config_of(data, KINDS['lora']))
  rows = train.load_data(c, parts.model).train.rows(0, 4, 0, 4, c.seed)
  rows = train.place(lambda start, stop: {k: v[start:stop] for k, v in rows.items()}, parts.batch)
  total, count = parts.eval_step(trained, rows)
  # The same arithmetic, fused differently.
  np.testing.assert_allclose(losses(tmp_path / 'second'), [float(total / count)], rtol=1e-6)
  untrained, _ = parts.eval_step(begun(config_of(data, KINDS['lora'])), rows)
  assert abs(float(untrained - total)) > 1e-3 * float(total)
  noted = json.loads((tmp_path / 'second/config.json').read_text())['adapter']
  assert (noted['name'], noted['rank'], noted['alpha'], noted['load']) == (
    *('lora', 4, 8.0),
    str(folder),
  )
  assert noted['leaves'] == {f'blocks/attn/{x}/kernel': [4, 8.0] for x in 'qv'}
  again = load_file(tmp_path / 'second/adapter-1/adapter_model.safetensors')
  before = load_file(folder / 'adapter_model.safetensors')
  assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in before.items()}
  assert all((again[key] != before[key]).any() for key in before)


def test_a_resumed_run_does_not_need_the_folder(data, folders, tmp_path):
  folder = shutil.copytree(folders('lora')[0], tmp_path / 'adapter')
  whole = one_device(going_on(data, folder, steps=4), tmp_path / 'whole')
  c = going_on(data, folder, steps=4)
  c.checkpoint.every = 2
  with pytest.MonkeyPatch.context() as patch:
    asked = iter([False, False, True, True, True])  # Before the third update, it is stopped.
    patch.setattr(train.Preemption, 'requested', lambda self: next(asked, True))
    assert one_device(c, tmp_path / 'run')['step'] == 2
  shutil.rmtree(folder)
  done = one_device(c, tmp_path / 'run')
  assert done['step'] == 4
  assert_equal(done['state'], whole['state'])
  assert losses(tmp_path / 'run') == losses(tmp_path / 'whole')
  with pytest.raises(ValueError, match=r'has no adapter_config\.json'):
    one_device(c, tmp_path / 'other')


@pytest.mark.parametrize(
  ('step', 'fields'),
  [
    ('layerwise', dict(remat='full', weights='nf4')),
    *(
      pytest.param(
        step,
        dict(optimizer=dict(name='mezo', learning_rate=0.1, eps=0.1)),
        marks=pytest.mark.slow,
      )
      for step in ('streamed', 'hybrid')
    ),
  ],
)
def test_folders_go_through_every_kind_of_step(step, fields, data, folders, tmp_path):
  folder, _ = folders('lora')
  fields = dict(fields)
  optimizer = fields.pop('optimizer', dict(name='adamw', learning_rate=0.05))
  c = going_on(data, folder, steps=1, step=step, **fields)
  c.optimizer = config_lib.optimizer(**optimizer)
  c.adapter.export = True
  parts = parts_of(c)
  params = parts.view(parts.init(build.root_key(c, 'params'))['params'])
  adapters.save_peft(tmp_path / 'begun', params, parts.model)
  expected = load_file(folder / 'adapter_model.safetensors')
  assert_equal(load_file(tmp_path / 'begun/adapter_model.safetensors'), expected)
  one_device(c, tmp_path / 'run')
  left = load_file(tmp_path / 'run/adapter-1/adapter_model.safetensors')
  assert set(left) == set(expected)
  assert any((left[key] != expected[key]).any() for key in left)


def test_factors_are_spread_over_a_mesh_as_drawn_ones_are(data, folders):
  folder, trained = folders('rslora')
  c = going_on(data, folder)
  parts = build.build(c, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  params = parts.init(build.root_key(c, 'params'))['params']
  assert_equal(adapters.trainable(params), adapters.trainable(trained))
  down = params['blocks']['mlp']['down']['kernel']
  assert tuple(down.a.sharding.spec) == (None, 'tensor', None)


def test_it_lies_beside_a_checkpoint_that_is_loaded(data, folders, tmp_path):
  folder, _ = folders('lora')
  model = models.Llama(**SIZES)
  draw = np.random.default_rng(0).standard_normal
  drawn = jax.tree.map(lambda x: np.float32(0.1 * draw(x.shape)), model.abstract())
  models.save(tmp_path / 'model', model, drawn)
  c = going_on(data, folder, load=str(tmp_path / 'model'), steps=1)
  c.model_args = dict(loss_chunk=64, **dict.fromkeys(SIZES))
  c.adapter.export = True
  params = begun(c)
  assert_equal(adapters.detach(params), drawn)
  q = params['blocks']['attn']['q']['kernel']
  factors = load_file(folder / 'adapter_model.safetensors')
  key = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'
  np.testing.assert_array_equal(q.a[1], factors[key].T)
  one_device(c, tmp_path / 'run')
  written = json.loads((tmp_path / 'run/adapter-1/adapter_config.json').read_text())
  assert written['base_model_name_or_path'] == c.load


def test_ranks_and_scales_of_each_leaf_are_the_folders(data, folders, tmp_path):
  folder = shutil.copytree(folders('lora')[0], tmp_path / 'adapter')
  tensors = load_file(folder / 'adapter_model.safetensors')
  part = {'A': lambda x: x[:3], 'B': lambda x: x[:, :3]}
  tensors = {
    key: np.ascontiguousarray(part[key.split('lora_')[1][0]](x)) if 'v_proj' in key else x
    for key, x in tensors.items()
  }
  save_file(tensors, folder / 'adapter_model.safetensors')
  edit(folder, rank_pattern={'v_proj': 3}, alpha_pattern={'v_proj': 7}, use_rslora=True)
  attn = begun(going_on(data, folder))['blocks']['attn']
  assert (attn['q']['kernel'].scale, attn['v']['kernel'].scale) == (8 / 4**0.5, 7 / 3**0.5)
  assert attn['v']['kernel'].b.shape == (2, 3, 16)


def edit(folder, **fields):
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  ('said', 'error'),
  [
    (dict(name='lora', rank=16), r'rank is 16, but .* has rank 4 at blocks/attn/q/kernel; leave'),
    (dict(name='dora'), r"name is 'dora', but .* holds 'lora'"),
    (dict(name='lora', alpha=4.0), r'alpha is 4.0, a scale of 1 at rank 4, but .* a scale of 2 at'),
    (dict(name='lora', rank_stabilized=True, alpha=2.0), r'scale of 1 at rank 4, but'),
    (
      dict(name='lora', targets='attn/q'),
      r'leaves out blocks/attn/v/kernel, but .* has an adapter',
    ),
    (dict(name='lora', targets='attn'), r'chooses blocks/attn/k/kernel, but .* has no adapter'),
    (dict(name='relora'), r"LoRA or DoRA, which config.adapter 'relora' is not"),
  ],
)
def test_what_contradicts_the_folder_is_refused(said, error, data, folders, tmp_path):
  c = config_of(data, said)
  c.adapter.load = str(folders('lora')[0])
  with pytest.raises(ValueError, match=error):
    one_device(c, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_what_agrees_with_the_folder_may_be_said(data, folders):
  """As in the config of the run that left it: of rsLoRA the folder has the alpha alone."""
  c = config_of(data, KINDS['rslora'])
  c.adapter.load = str(folders('rslora')[0])
  found = peft_folder.resolved(c).adapter
  assert (found.rank, found.alpha, found.rank_stabilized) == (4, 6.0, False)
  assert not c.adapter.leaves  # The caller's own stays.


def test_the_rest_of_the_adapter_is_the_configs(data, folders):
  said = dict(name='lora', rest='norm', dropout=0.25, rate_ratio=4.0, dtype='bfloat16')
  c = config_of(data, said)
  c.adapter.load = str(folders('lora')[0])
  params = begun(c)
  q = params['blocks']['attn']['q']['kernel']
  assert (q.dropout, q.a.dtype, q.key is None) == (0.25, 'bfloat16', False)
  assert adapters.trainable(params)['final_norm']['scale'] is not None


def test_another_models_folder_is_refused_by_leaf(data, folders, tmp_path):
  c = going_on(data, folders('lora')[0])
  c.model_args.hidden = 32
  with pytest.raises(ValueError, match=r'blocks/attn/q/kernel is \[32, 32\].*another model'):
    one_device(c, tmp_path / 'run')
  folder = shutil.copytree(folders('lora')[0], tmp_path / 'adapter')
  tensors = load_file(folder / 'adapter_model.safetensors')
  absent = {key: x for key, x in tensors.items() if 'layers.1.self_attn.v_proj' not in key}
  save_file(absent, folder / 'adapter_model.safetensors')
  with pytest.raises(ValueError, match=r'blocks/attn/v/kernel is adapted .* not in layer 1'):
    one_device(going_on(data, folder), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_folder_that_changed_before_the_first_checkpoint_is_refused(data, folders, tmp_path):
  folder = shutil.copytree(folders('lora')[0], tmp_path / 'adapter')
  c = going_on(data, folder)
  parts = parts_of(peft_folder.resolved(c))
  edit(folder, lora_alpha=16)
  with pytest.raises(
    ValueError, match=r'blocks/attn/q/kernel has rank and alpha \(4, 16.0\) there'
  ):
    parts.init(build.root_key(c, 'params'))


@pytest.mark.parametrize(
  ('said', 'error'),
  [
    (dict(name='none'), 'writes an adapter, and there is none'),
    (dict(name='relora'), r"'relora' adds what it learnt to the weights .* config.export=True"),
    (dict(name='rso'), r"'rso' adds what it learnt"),
    (dict(name='switchlora'), r"'switchlora' adds what it learnt"),
    (dict(name='pc_lora'), r"'pc_lora' is more than two factors"),
    (dict(name='melora'), r"'melora' is more than two factors"),
    (dict(name='sora'), r"'sora' is more than two factors"),
    (dict(name='lora', rest='norm'), r"rest='norm' trains more than the adapters"),
    (dict(name='lora', targets='embed'), r'^embed/embedding is adapted, but is no linear map'),
  ],
)
def test_adapters_without_that_form_are_refused_before_they_train(said, error, data):
  c = config_of(data, said)
  c.adapter.export = True
  with pytest.raises(ValueError, match=error):
    parts_of(c)
