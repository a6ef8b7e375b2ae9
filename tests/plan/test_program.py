"""One program on one target: the parts of a report, and refusals in a sentence."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from memjax import config
from memjax.plan import exported, memory, program, targets

P = PartitionSpec


def shapes(mesh, host_kind=None):
  """A state of 512 KiB of weights in halves, 128 KiB that pass through, and a batch of 64 KiB."""

  def array(*shape, spec, kind=None):
    where = NamedSharding(mesh, spec, memory_kind=kind) if kind else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  weights, passed = array(256, 512, spec=P('fsdp')), array(256, 128, spec=P(), kind=host_kind)
  return {'params': weights, 'kept': passed}, array(64, 256, spec=P(('data', 'fsdp')))


def step(state, batch):
  loss, gradient = jax.value_and_grad(lambda w: jnp.mean((batch @ w) ** 2))(state['params'])
  return state | {'params': state['params'] - 0.1 * gradient}, loss


def report_of(path, target, mesh, host_kind=None, f=None):
  f = f or jax.jit(step, donate_argnums=0)
  job = exported.export_job(f, shapes(mesh, host_kind), targets.parse(target), path / 'step')
  return program.report(job)


TWO_BY_TWO = AbstractMesh((2, 2), ('data', 'fsdp'))


def test_an_exported_step_keeps_its_shardings_and_donates_its_state(tmp_path):
  pytest.importorskip('libtpu')
  report = report_of(tmp_path, 'v5e:2x2', TWO_BY_TWO)
  assert report['error'] is None
  assert report['fits']
  assert report['limit_bytes'] == 15.75 * 2**30
  compiled = report['compiled']
  assert compiled['alias'] == 2**18 + 2**17  # The weights of one device, and what passes through.
  assert compiled['argument'] == 2**18 + 2**17 + 2**14
  assert compiled['argument'] < report['peak_bytes'] < 2**24
  # Gradients are reduced over the batch's four devices, weights are gathered in halves.
  assert sum(report['collectives'].values()) >= 2**18


def test_a_program_that_jax_cannot_read_has_a_peak_and_unknown_collectives(tmp_path, monkeypatch):
  """As those that libtpu 0.0.52 makes for a v6e with JAX 0.10."""

  def as_text(self):
    raise jax.errors.JaxRuntimeError('async-update instruction should have 1 operands but sees 3')

  pytest.importorskip('libtpu')
  x = jax.ShapeDtypeStruct((2**10,), jnp.float32)
  target = targets.parse('v6e:1x1')
  job = exported.export_job(jax.jit(lambda x: x + 1), (x,), target, tmp_path / 'step')
  assert program.report(job)['collectives'] == {}
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', as_text)
  report = program.report(job)
  assert report['error'] is None
  assert report['peak_bytes'] >= 2**13
  assert report['collectives'] is None
  assert 'collectives are unknown' in report['notes'][0]


def test_arguments_in_host_memory_take_no_device_memory(tmp_path):
  pytest.importorskip('libtpu')
  there = report_of(tmp_path, 'v5e:2x2', TWO_BY_TWO, 'pinned_host')
  here = report_of(tmp_path, 'v5e:2x2', TWO_BY_TWO)
  assert there['host_bytes'] == 2**17
  assert here['host_bytes'] == 0
  assert here['peak_bytes'] - there['peak_bytes'] == pytest.approx(2**17, rel=0.05)


def test_what_does_not_fit_is_an_answer(tmp_path):
  """256 GiB in, 256 GiB out, on a device that has 15.75."""
  pytest.importorskip('libtpu')
  x = jax.ShapeDtypeStruct((2**36,), jnp.float32)
  target = targets.parse('v5e:1x1')
  job = exported.export_job(jax.jit(lambda x: x + 1), (x,), target, tmp_path / 'step')
  report = program.report(job)
  assert report['fits'] is False
  assert report['peak_bytes'] == 512 * 2**30
  assert report['limit_bytes'] == 15.75 * 2**30
  assert report['collectives'] is None
  assert 'CompileTimeHbmOom' in report['message']


def test_temporaries_in_host_memory_take_no_device_memory(tmp_path):
  """64 MiB of weights on the host go through a layer loop, which makes 64 MiB of new ones there."""
  pytest.importorskip('libtpu')
  target = targets.parse('v5e:1x1')
  mesh = AbstractMesh((1,), ('data',))
  at = lambda kind: NamedSharding(mesh, P(), memory_kind=kind)
  host = at('pinned_host')

  def body(x, w):
    w = jax.device_put(w, jax.memory.Space.Device)
    y = jnp.tanh(x @ w)
    return y, jax.device_put(w - 0.1 * (x.T @ y), jax.memory.Space.Host)

  f = jax.jit(lambda ws, x: jax.lax.scan(body, x, ws)[::-1], donate_argnums=0)
  weights = jax.ShapeDtypeStruct((64, 512, 512), jnp.float32, sharding=host)
  x = jax.ShapeDtypeStruct((128, 512), jnp.float32, sharding=at('device'))
  report = program.report(exported.export_job(f, (weights, x), target, tmp_path / 'step'))
  assert report['error'] is None
  assert report['compiled']['host_temp'] >= 2**26  # Else this program is none of those meant.
  assert report['compiled']['temp'] <= report['peak_bytes'] < 2**24
  assert report['host_bytes'] >= 2**27


def test_one_device_keeps_its_memory_kinds(tmp_path):
  """128 KiB on the host, given as one of a single device."""
  device = jax.devices()[0]
  there = jax.sharding.SingleDeviceSharding(device, memory_kind='pinned_host')
  leaf = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=there)
  target = targets.parse('local')._replace(devices=1)
  f = jax.jit(lambda x, y: (x, y + 1), donate_argnums=0)
  y = jax.ShapeDtypeStruct((8,), jnp.float32)
  job = exported.export_job(f, (leaf, y), target, tmp_path / 'step')
  step, leaves, intended = exported.load(job, [device])
  assert memory.host_bytes(intended) == 2**17
  _, found = program.compile_lowered(step.lower(*leaves), device.platform)
  answer = program.verdict(found, None, 'cpu', 2**17)
  assert answer['argument_bytes'] == 32
  assert answer['peak_bytes'] < 2**17


def test_a_local_step_is_compiled_for_the_devices_that_are_here(tmp_path):
  mesh = AbstractMesh((4, 2), ('data', 'fsdp'))
  report = report_of(tmp_path, 'local', mesh)
  assert report['devices'] == 8
  assert report['compiled']['argument'] == 2**18 + 2**17 + 2**13
  assert report['compiled']['alias'] == 2**18 + 2**17


def test_a_step_that_is_not_jitted_or_has_another_mesh_is_refused(tmp_path):
  with pytest.raises(ValueError, match='not jitted'):
    report_of(tmp_path, 'v5e:2x2', TWO_BY_TWO, f=step)
  with pytest.raises(ValueError, match=r'v5e:1x1 has 1 devices, but the shardings .* over 4;'):
    report_of(tmp_path, 'v5e:1x1', TWO_BY_TWO)


def small_config(**changes):
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_tiny', 8, 16
  c.model_args = dict(loss_chunk=64)
  c.unlock().update(changes)
  return c.to_dict()


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(mesh=dict(data=3)), "mesh .*'data': 3.* but there are 8; change config.mesh"),
    (dict(batch_size=6), 'micro-batch of 6 .* does not divide .* 8 devices'),
    (
      dict(mesh=dict(data=1, tensor=8), model_args=dict(intermediate=84)),
      'blocks/mlp/.*84.* does not divide over .*8 devices; change config.mesh',
    ),
    (dict(model='llama_tinny'), 'llama_tinny'),
  ],
)
def test_a_config_that_does_not_go_with_the_devices_is_a_sentence(changes, words):
  report = program.report({'target': 'local', 'config': small_config(**changes)})
  assert report['kind'] == 'refused'
  assert report['fits'] is None
  assert '\n' not in report['error']
  with pytest.raises(ValueError, match=words):
    raise ValueError(report['error'])


def test_a_second_compile_is_read_from_the_disk(tmp_path):
  mesh = AbstractMesh((4, 2), ('data', 'fsdp'))

  def report_at(batch):
    arguments = shapes(mesh)[0], jax.ShapeDtypeStruct((batch, 256), jnp.float32)
    f = jax.jit(step, donate_argnums=0)
    job = exported.export_job(f, arguments, targets.parse('local'), tmp_path / 'step')
    return program.report(job | {'cache_dir': str(tmp_path)})

  first, second, other = report_at(8), report_at(8), report_at(16)
  assert (first['cached'], second['cached'], other['cached']) == (False, True, False)
  # What this machine has available changes from one moment to the next.
  assert first | {'cached': True, 'limit_bytes': second['limit_bytes']} == second


def cached_in(path, **changes):
  """The name of the cache's entry for one program on the device that is here, or on another."""
  device = types.SimpleNamespace(device_kind='A100', client=jax.devices()[0].client)
  vars(device).update(changes)
  return program._entry(path, targets.parse('local'), device, None, 'module @jit_step')


def test_a_compile_on_another_device_or_with_other_flags_is_another(tmp_path, monkeypatch):
  first = cached_in(tmp_path)
  assert cached_in(tmp_path) == first
  assert cached_in(tmp_path, device_kind='H100') != first
  monkeypatch.setenv('XLA_FLAGS', '--xla_something')
  assert cached_in(tmp_path) != first


@pytest.mark.parametrize('text', ['', '[]', '{"compiled": {}}', None])
def test_a_damaged_entry_of_the_cache_is_none(tmp_path, text):
  entry = tmp_path / 'entry.json'
  if text is not None:
    entry.write_text(text)
  assert program._read(entry) is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path):
  (tmp_path / 'file').write_text('')
  program._write(tmp_path / 'file' / 'entry.json', {})


def test_an_exception_is_a_report():
  report = program.report({'target': 'local', 'config': small_config(model_args=dict(layerz=1))})
  assert report['kind'] in ('refused', 'failed')
  assert 'layerz' in report['error']
  report = program.report({'target': 'local', 'exported': '/nowhere'})
  assert report['kind'] == 'failed'
  assert report['error'].startswith('local: FileNotFoundError')
  assert 'Traceback' in report['message']


@pytest.mark.parametrize(
  ('message', 'sizes'),
  [
    ('HLO temporaries (512.00M) exceeds available HBM (15.75G). HLO', (2**29, 63 * 2**28)),
    ('Ran out of memory in memory space hbm. Used 17.50G of 15.50G hbm.', (35 * 2**29, 31 * 2**29)),
    ('Mosaic failed to compile', None),
  ],
)
def test_the_compilers_words_name_need_and_limit(message, sizes):
  assert program.read_out_of_memory(message) == sizes


def test_a_program_for_gpus_is_not_read_from_the_persistent_cache(tmp_path):
  """A GPU's program that comes from there has lost its temporaries."""
  options = {
    'jax_compilation_cache_dir': str(tmp_path),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in options}

  def lowered():
    def stored(x):
      return jnp.sort(x) @ x

    return jax.jit(stored).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))

  try:
    for name, value in options.items():
      jax.config.update(name, value)
    program.compilation_cache.reset_cache()
    program.compile_lowered(lowered(), 'gpu')
    assert not list(tmp_path.glob('*stored*'))
    program.compile_lowered(lowered(), 'cpu')
    assert list(tmp_path.glob('*stored*'))
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    program.compilation_cache.reset_cache()
