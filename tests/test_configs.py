"""Every config file loads and builds at full size as shapes; `:smoke` trains."""

import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import launch
import pytest

from memjax import config as config_lib
from memjax import models, optimizers, sharding
from memjax.build import build, root_key
from memjax.naming import path_string
from memjax.train import train

FILES = sorted(p.name for p in (launch.ROOT / 'configs').glob('*.py'))

# GaLore (arXiv 2403.03507), section 5 and appendix C, and the official scripts. Parameters by hand:
# 2 V D + L (4 D^2 + 3 D F + 2 D) + D, for vocabulary V, width D, L layers of inner width F.
PUBLISHED = {  # size: rank, updates, learning rate, refresh every, clip norm, parameters.
  '60m': (128, 10_000, 0.01, 200, 0.0, 58_073_600),
  '130m': (256, 20_000, 0.01, 200, 0.0, 134_105_856),
  '350m': (256, 60_000, 0.01, 200, 0.0, 367_969_280),
  '1b': (512, 100_000, 0.01, 200, 0.0, 1_339_082_752),
  '7b': (1024, 150_000, 0.005, 500, 1.0, 6_738_415_616),
}

# One layer at a time: model, optimizer, weights, learning rate, clip norm. Scripts of Q-GaLore and
# APOLLO; AdaLomo (arXiv 2310.10195) and LOMO (2306.09782).
LAYERWISE = {
  'adalomo_llama7b': ('llama_7b', 'adalomo', 'dense', 1e-3, 0.0),
  'apollo_mini_llama7b': ('llama_7b', 'apollo_mini8bit', 'dense', 0.01, 0.0),
  'apollo_mini_llama13b_int8': ('llama2_13b', 'apollo_mini8bit', 'int8', 0.01, 0.0),
  'galore8bit_llama7b': ('llama_7b', 'galore8bit', 'dense', 0.005, 1.0),
  'lomo_llama7b': ('llama_7b', 'sgd', 'dense', 0.03, 1.0),
  'q_galore_llama7b': ('llama_7b', 'q_galore8bit', 'int8', 0.004, 0.0),
}

# Values of the loss in place of gradients, with the choices of MeZO (arXiv 2305.17333, tables 15
# and 16): model, step, optimizer.
ZEROTH_ORDER = {
  'lozo_llama7b': ('llama_7b', 'zeroth_order', 'lozo'),
  'mezo_llama7b': ('llama_7b', 'zeroth_order', 'mezo'),
  'mezo_opt13b': ('opt_13b', 'zeroth_order', 'mezo'),
  'zo2_opt13b': ('opt_13b', 'streamed', 'mezo'),
  'zo2_opt66b': ('opt_66b', 'streamed', 'mezo'),
  'zo2_opt175b': ('opt_175b', 'streamed', 'mezo'),
}


# Factors in place of matrices, with the authors' choices: adapter, rank, optimizer, learning rate,
# updates, sequences of 512 an update. ReLoRA (arXiv 2307.05695), SwitchLoRA (2406.06564); where RSO
# (2502.07222) prints none, GaLore's.
RESTARTS = {
  'relora_llama350m': ('llama_350m', 'relora', 128, 'adamw', 1e-3, 20_000, 1152),
  'rso_llama1b': ('llama_1b', 'rso', 512, 'vector_adam', 5e-4, 100_000, 512),
  'switchlora_llama350m': ('llama_350m', 'switchlora', 256, 'vector_adam', 0.02, 40_000, 1152),
}

# Factors beside a frozen model. JORA (arXiv 2403.11366) and QLoRA (2305.14314, appendix B.2), with
# rank 16: model, weights, targets, learning rate, clip norm, sequences an update, updates.
FROZEN = {
  'lora_llama7b_tp': ('llama_7b', 'dense', 'attn/(q|v)/', 1e-4, 0.0, 8, 1000),
  'qlora_llama7b': ('llama_7b', 'nf4', '', 2e-4, 0.3, 16, 1875),
}


# Their choices are tested in tests/tasks/test_recipes.py and tests/steps/test_selected.py.
ON_TASKS = ('colm_phi2', 'glue', 'instruct', 'mezo_opt')


@pytest.fixture(params=FILES)
def file(request, monkeypatch):
  monkeypatch.chdir(launch.ROOT)
  return f'configs/{request.param}'


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def test_every_file_is_tested():
  tables = (PUBLISHED, PUBLISHED, LAYERWISE, ZEROTH_ORDER, RESTARTS, FROZEN, ON_TASKS)
  assert len(FILES) == sum(map(len, tables)) + 1


@pytest.mark.parametrize('arg', ['', ':smoke'])
def test_a_config_file_loads_and_builds_as_shapes(file, arg):
  c = config_lib.load(file + arg)
  rows = c.batch_size if c.select.name == 'none' else c.select.keep
  devices = jax.devices()[: math.gcd(8, rows // c.accumulate)]
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=devices)
  parts = build(c, mesh)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(parts.state))
  assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(parts.state))


@pytest.mark.parametrize('size', PUBLISHED)
def test_the_published_recipes(size):
  rank, steps, learning_rate, refresh_every, clip_norm, params = PUBLISHED[size]
  galore = config_lib.load(str(launch.ROOT / f'configs/galore_llama{size}.py'))
  adamw = config_lib.load(str(launch.ROOT / f'configs/adamw_llama{size}.py'))
  for c in (galore, adamw):
    assert c.steps == steps
    assert (c.batch_size, c.seq_len) == (512, 256)
    assert c.clip_norm == clip_norm
    assert (c.param_dtype, c.compute_dtype) == ('bfloat16', 'bfloat16')
    s = c.schedule
    assert (s.name, s.warmup_ratio, s.final_ratio) == ('cosine', 0.1, 0.1)
    assert models.create(c.model).num_params() == params
  o = galore.optimizer
  assert (o.name, o.rank, o.refresh_every, o.scale) == ('galore', rank, refresh_every, 0.25)
  assert o.learning_rate == learning_rate
  assert (o.b1, o.b2, o.eps, o.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
  assert adamw.optimizer.name == 'adamw'


@pytest.mark.parametrize('name', LAYERWISE)
def test_recipes_of_one_layer_at_a_time(name):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py'))
  o = c.optimizer
  found = (c.model, o.name, c.weights, o.learning_rate, c.clip_norm)
  assert found == LAYERWISE[name]
  assert (c.step, c.remat, c.batch_size, c.seq_len) == ('layerwise', 'full', 512, 256)
  if 'galore' in name:
    assert (o.rank, o.refresh_every, o.scale) == (1024, 500, 0.25)


@pytest.mark.parametrize('name', ZEROTH_ORDER)
def test_recipes_of_values_in_place_of_gradients(name):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py'))
  assert (c.model, c.step, c.optimizer.name) == ZEROTH_ORDER[name]
  assert (c.batch_size, c.steps, c.schedule.name) == (16, 20_000, 'constant')
  o = c.optimizer
  assert o.learning_rate in (1e-6, 1e-7)  # The published grid.
  assert (o.eps, o.weight_decay) == (1e-3, 0.0)
  assert (c.param_dtype, c.rounding) == ('bfloat16', 'stochastic')


@pytest.mark.parametrize('name', RESTARTS)
def test_recipes_of_factors_that_begin_anew(name):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py'))
  found = c.model, c.adapter.name, c.adapter.rank, c.optimizer.name, c.optimizer.learning_rate
  assert (*found, c.steps, c.batch_size) == RESTARTS[name]
  if c.adapter.name == 'relora':
    s = c.schedule
    assert (s.name, s.restart_every, s.restart_warmup) == ('jagged', c.adapter.every, 100)
    assert (c.adapter.every, c.adapter.alpha, c.adapter.prune) == (5000, 32, 'magnitude')
  if c.adapter.name == 'switchlora':
    assert (c.adapter.interval, c.adapter.descent, c.adapter.freeze) == (40, 4000, 5)


@pytest.mark.parametrize('name', FROZEN)
def test_recipes_of_factors_beside_a_frozen_model(name):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py'))
  o, a = c.optimizer, c.adapter
  found = c.model, c.weights, a.targets, o.learning_rate, c.clip_norm, c.batch_size, c.steps
  assert found == FROZEN[name]
  assert (a.name, a.rank, a.alpha, c.seq_len, c.remat) == ('lora', 16, 16, 2048, 'full')


def test_weights_in_4_bits_are_not_trained_themselves():
  c = config_lib.load(str(launch.ROOT / 'configs/qlora_llama7b.py:smoke'))
  c.unlock().adapter = config_lib.adapter('none')
  with pytest.raises(ValueError, match=r"weights='nf4' holds weights that stay .*name='lora'"):
    config_lib.validate(c)


@pytest.mark.slow
def test_weights_in_4_bits_stay_while_factors_train(tmp_path):
  c = config_lib.load(str(launch.ROOT / 'configs/qlora_llama7b.py:smoke'))
  c.eval_every, c.sample.tokens = 0, 0
  c.steps, c.optimizer.learning_rate = 8, 0.02  # So that eight steps show more than their noise.
  state = train(c, tmp_path, devices=jax.devices()[:1])['state']
  losses = [*launch.losses(tmp_path).values()]
  assert losses[-1] < losses[0] < 6.6  # ln 512 = 6.24, and what the initial weights add.
  kernel = state['params']['blocks']['mlp']['up']['kernel']
  assert (kernel.base.codes.dtype, kernel.a.dtype) == ('uint8', 'float32')


def test_streamed_blocks_are_on_the_host_and_the_rest_is_not():
  c = config_lib.load(str(launch.ROOT / 'configs/zo2_opt175b.py'))
  params = build(c, one_device()).state['params']
  kinds = {
    path_string(path): leaf.sharding.memory_kind
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  on_host = {path for path, kind in kinds.items() if kind == 'pinned_host'}
  matrices = {f'attn/{name}' for name in 'qkvo'} | {'mlp/up', 'mlp/down'}
  assert on_host == {f'blocks/{name}/kernel' for name in matrices}


@pytest.mark.parametrize(
  ('field', 'value'), [('optimizer.samples', 2), ('optimizer.sides', 1), ('optimizer.name', 'lozo')]
)
def test_a_streamed_run_refuses_what_would_stream_more(field, value):
  c = config_lib.load(str(launch.ROOT / 'configs/zo2_opt13b.py:smoke'))
  c.unlock().update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f'config.{field} is {value!r}.*zeroth_order'):
    build(c, one_device())


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYERWISE)
def test_a_smoke_config_trains_one_layer_at_a_time(name, tmp_path):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py:smoke'))
  c.steps, c.eval_every, c.sample.tokens = 2, 0, 0
  up = lambda state: state['params']['blocks']['mlp']['up']['kernel']
  kernel = up(train(c, tmp_path, devices=jax.devices()[:1])['state'])
  losses = launch.losses(tmp_path).values()
  assert max(losses) < 6.6  # ln 512 = 6.24, and what the initial weights add.
  if c.weights == 'int8':  # A byte a weight.
    assert (kernel.codes.dtype, kernel.scales.dtype) == ('int8', 'float32')
  else:
    assert kernel.dtype == 'bfloat16'
  fresh = up(build(c, one_device()).init(root_key(c, 'params')))
  moved = [(x != y).mean() for x, y in zip(jax.tree.leaves(kernel), jax.tree.leaves(fresh))]
  assert max(moved) > 0.01


def test_weights_in_8_bits_refuse_what_loses_updates():
  c = config_lib.load(str(launch.ROOT / 'configs/q_galore_llama7b.py:smoke'))
  c.rounding = 'nearest'
  with pytest.raises(ValueError, match='loses every update'):
    config_lib.validate(c)


def test_the_official_rank_of_1b_is_an_argument():
  c = config_lib.load(str(launch.ROOT / 'configs/galore_llama1b.py:rank=1024'))
  assert c.optimizer.rank == 1024


@pytest.mark.slow
@pytest.mark.parametrize('method', ['galore', 'adamw'])
def test_a_smoke_config_trains(method, tmp_path):
  """One size: the smoke configs of the others differ in nothing that runs."""
  c = config_lib.load(str(launch.ROOT / f'configs/{method}_llama60m.py:smoke'))
  c.steps, c.eval_every, c.sample.tokens = 2, 0, 0
  result = train(c, tmp_path, devices=jax.devices()[:1])
  assert result['step'] == 2
  first, second = launch.losses(tmp_path).values()
  assert second < first < 6.6  # ln 512 = 6.24, and what the initial weights add.
  assert {x.dtype.name for x in jax.tree.leaves(result['state']['params'])} == {'bfloat16'}


def test_smoke_configs_differ_only_in_what_the_size_decides():
  smoke = [
    config_lib.load(str(launch.ROOT / f'configs/galore_llama{size}.py:smoke')).to_dict()
    for size in PUBLISHED
  ]
  for c in smoke:
    c['remat'] = c['clip_norm'] = c['optimizer']['learning_rate'] = None
  assert all(c == smoke[0] for c in smoke)


def test_another_optimizer_by_name_alone():
  c = config_lib.load(str(launch.ROOT / 'configs/quickstart.py:smoke'))
  c.optimizer.name = 'adamw'
  parts = build(c, one_device())
  moments = [x for x in jax.tree.leaves(parts.state['opt']) if x.ndim > 1]
  matrices = [x for x in jax.tree.leaves(parts.state['params']) if x.ndim > 1]
  assert len(moments) == 2 * len(matrices)  # Two full-rank moments a matrix, and no basis.


def test_the_work_directory_is_named_after_the_config():
  assert config_lib.run_name('configs/quickstart.py') == 'quickstart'
  assert config_lib.run_name('configs/quickstart.py:smoke,method=adamw').startswith('quickstart-')


def test_docstrings_show_the_command():
  for name in FILES:
    text = pathlib.Path(launch.ROOT / 'configs' / name).read_text()
    assert f'python run.py --config=configs/{name}' in text


def test_the_layers_learn_at_their_share_of_the_rate():
  """Of the same gradient: the update of a layer's matrix is scaled, that of the embedding not."""
  c = config_lib.default().unlock()
  c.model, c.schedule.warmup_ratio = 'llama_tiny', 0.0
  updates = {}
  for c.layer_scale in (1.0, 0.25):
    parts = build(c, one_device())
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), parts.state['params'])
    state = parts.transform.init(params)
    updates[c.layer_scale], _ = parts.transform.update(params, state, params)
  scaled = jax.tree.map(lambda one, quarter: (quarter / one).mean(), *updates.values())
  assert set(map(float, jax.tree.leaves(scaled['blocks']['mlp']))) == {0.25}
  assert float(scaled['embed']['embedding']) == float(scaled['blocks']['mlp_norm']['scale']) == 1


def test_the_first_runs_methods_are_optimizers_of_every_kind():
  spec = str(launch.ROOT / 'configs/quickstart.py')
  methods = runpy.run_path(spec)['METHODS']
  for name in methods:
    build(config_lib.load(f'{spec}:smoke,method={name}'), one_device())
  missing = set(optimizers.OPTIMIZERS) - {chosen['name'] for chosen, _ in methods.values()}
  assert missing == {'sgd'}  # Plain descent does not train a transformer.


def test_the_first_runs_methods_take_a_rank_and_a_share_of_the_rate():
  load = lambda arg: config_lib.load(str(launch.ROOT / f'configs/quickstart.py:{arg}'))
  lora = load('method=lora,rank=8,share=0.4,batch_size=32')
  assert (lora.adapter.rank, lora.layer_scale, lora.batch_size) == (8, 0.4, 32)
  galore = load('rank=8,share=0.2')
  assert (galore.optimizer.rank, galore.optimizer.scale, galore.layer_scale) == (8, 0.2, 1)
  switched = load('method=switchlora,rank=8').adapter
  assert switched.alpha / switched.rank == 1 / 8  # As at rank 64.
  with pytest.raises(ValueError, match="'adamw' has no rank"):
    load('method=adamw,rank=8')
