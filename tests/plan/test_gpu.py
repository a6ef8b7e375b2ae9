"""Programs compiled for NVIDIA cards that are not here, by XLA's GPU compiler.

pip install -e '.[plan-gpu,test]'
pytest -m gpu_plan tests/plan/test_gpu.py
"""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from memjax import build, config, sharding
from memjax.plan import compiler, exported, program, targets
from memjax.steps import whole_tree

pytestmark = [
  pytest.mark.gpu_plan,
  pytest.mark.skipif(not importlib.util.find_spec('jax_cuda12_plugin'), reason='no GPU compiler'),
]
P = PartitionSpec


def step(weights, kept, batch):
  loss, gradient = jax.value_and_grad(lambda w: jnp.mean((batch @ w) ** 2))(weights)
  return weights - 0.1 * gradient, kept, loss


def job(tmp_path, target, ways, host_kind='device'):
  """A step whose 4 MiB of weights are sharded over all devices, beside 1 MiB that passes."""
  mesh = AbstractMesh((ways,), ('fsdp',))

  def array(*shape, spec, kind='device'):
    where = NamedSharding(mesh, spec, memory_kind=kind)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  arguments = (
    array(1024, 1024, spec=P('fsdp')),
    array(512, 512, spec=P(), kind=host_kind),
    array(64, 1024, spec=P('fsdp')),
  )
  f = jax.jit(step, donate_argnums=(0, 1))
  path = tmp_path / f'{target}-{host_kind}'.replace('*', '-')
  return exported.export_job(f, arguments, targets.parse(target), path)


CARDS = [row['name'] for row in targets.known() if row['platform'] == 'gpu']


def test_every_card_compiles(tmp_path):
  reports = compiler.compile_jobs([job(tmp_path, card, 1) for card in CARDS], cache_dir='')
  for card, report in zip(CARDS, reports, strict=True):
    assert report['error'] is None, card
    assert report['fits']
    assert report['limit_bytes'] == targets.parse(card).limit_bytes
    assert report['compiled']['argument'] == 5 * 2**20 + 2**18
    assert report['compiled']['alias'] == 5 * 2**20


def test_eight_cards_gather_weights_and_scatter_gradients(tmp_path):
  """Alike to the TPU: 4 MiB each way, and the loss."""
  (report,) = compiler.compile_jobs([job(tmp_path, 'h100-80g*8', 8)], cache_dir='')
  assert report['devices'] == 8
  assert report['compiled']['argument'] == 2**19 + 2**20 + 2**15
  assert report['compiled']['alias'] == 2**19 + 2**20
  moved = report['collectives']
  assert moved['all-gather'] == 2**22
  assert moved.get('reduce-scatter', 0) + moved['all-reduce'] == 2**22 + 4


def test_arguments_in_host_memory_take_no_device_memory(tmp_path):
  jobs = [job(tmp_path, 'rtx4090', 1, kind) for kind in ('device', 'pinned_host')]
  here, there = compiler.compile_jobs(jobs, cache_dir='')
  assert there['host_bytes'] == 2**20
  assert here['peak_bytes'] - there['peak_bytes'] == pytest.approx(2**20, rel=0.01)


def tiny():
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_tiny', 8, 64
  c.model_args = dict(loss_chunk=64)
  c.optimizer = config.optimizer('adamw', learning_rate=0.1)
  return c


def test_a_config_needs_the_same_when_its_code_is_optimised(monkeypatch):
  """The options that save compile time leave every buffer as it is."""
  devices = targets.open_devices(targets.parse('rtx4090'))
  assert devices[0].platform == 'gpu'
  fast = program.report(compiler.config_job(tiny(), 'rtx4090'))
  monkeypatch.setattr(program, '_FAST', {})
  slow = program.report(compiler.config_job(tiny(), 'rtx4090'))
  assert fast['error'] is slow['error'] is None
  assert fast['compiled'] == slow['compiled']
  assert fast['compiled']['argument'] == sum(fast['parts'].values())


def test_adamw_at_7b_needs_52_gib_of_a_4090(tmp_path):
  """Batch 1 x 2048, bfloat16 weights and moments, rematerialised."""
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_7b', 1, 2048
  c.param_dtype = c.compute_dtype = 'bfloat16'
  c.remat = 'full'
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = build.build_model(c, mesh)
  transform = optax.adamw(1e-4, mu_dtype='bfloat16')  # The second moment is the parameter's dtype.
  f = jax.jit(whole_tree.make_train_step(model.loss, transform), donate_argnums=0)
  key = jax.random.key(0)
  state = jax.eval_shape(lambda: whole_tree.init_state(model.init, transform, key))
  arguments = state, build.batch_shapes(1, 2048, mesh)
  job = exported.export_job(f, arguments, targets.parse('rtx4090'), tmp_path / 'step')
  (report,) = compiler.compile_jobs([job], cache_dir='')
  assert report['error'] is None
  assert report['fits'] is False
  assert report['peak_bytes'] == pytest.approx(52.1 * 2**30, rel=0.05)


def in_place(optimizer, layers=4, **changes):
  """A config in bfloat16, of layers whose matrices are large beside what else a step holds."""
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_60m', 1, 64
  c.model_args = dict(loss_chunk=64, layers=layers, vocab=2048)
  c.param_dtype = c.compute_dtype = 'bfloat16'
  c.optimizer = optimizer
  c.update(changes)
  return c


MEZO = config.optimizer('mezo', learning_rate=1e-6, eps=1e-3, log_steps=9)
ADALOMO = config.optimizer('adalomo', learning_rate=1e-3)


@pytest.mark.parametrize(
  ('optimizer', 'changes'),
  [
    pytest.param(MEZO, dict(step='zeroth_order'), id='zeroth order'),
    pytest.param(ADALOMO, dict(step='layerwise', remat='full'), id='layerwise'),
  ],
)
def test_a_step_writes_over_the_weights_without_a_copy(optimizer, changes):
  """More layers take room for their weights and inputs alone."""
  temporary, parameters = [], []
  for layers in (12, 24):
    job = compiler.config_job(in_place(optimizer, layers, **changes), 'rtx4090')
    found = program.report(job)
    assert found['error'] is None
    temporary.append(found['compiled']['temp'])
    parameters.append(found['parts']['parameters'])
  more = parameters[1] - parameters[0]
  assert more > 2**24
  assert temporary[1] - temporary[0] < 0.1 * more


def test_the_start_of_a_log_holds_no_second_copy_of_the_weights():
  c = config.load('configs/mezo_llama7b.py')
  mesh = sharding.make_mesh(devices=targets.open_devices(targets.parse('rtx4090'))[:1])
  init = build.build(c, mesh).init
  compiled = init.lower(jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis()
  assert compiled.output_size_in_bytes > 12 * 2**30
  assert compiled.temp_size_in_bytes < 2**30
