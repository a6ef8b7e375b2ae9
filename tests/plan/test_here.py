"""A run on the very devices it is planned for; and the command that plans for others."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from PIL import Image

import memjax
from memjax import build, config, sharding
from memjax.plan import here, memory
from memjax.train import train
from tests import launch

SMOKE = str(launch.ROOT / 'configs/adamw_llama60m.py:smoke')


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def small():
  c = config.load(SMOKE)
  c.model_args = dict(layers=1, loss_chunk=64)
  c.param_dtype = c.compute_dtype = 'float32'
  c.optimizer = config.optimizer('sgd', learning_rate=0.1)
  return c


@pytest.fixture(scope='module')
def compiled():
  return here.compile_here(small(), build.build(small(), one_device()))


def test_the_receipt_of_this_machine_sums_to_the_compilers_figures(compiled):
  step, found = compiled
  parts, sizes = found['parts'], memory.of_compiled(step)
  assert parts['activations_and_temporaries'] + parts['gradients'] == sizes['temp']
  assert sum(parts.values()) == found['peak_bytes'] >= sizes['argument'] + sizes['temp']
  assert parts['compiler_reserved'] == 0
  assert found['fits'] is True
  json.dumps(found)


def test_a_run_that_cannot_fit_stops_with_ways_out_and_allocates_nothing(
  compiled, tmp_path, monkeypatch
):
  need = compiled[1]['peak_bytes']
  monkeypatch.setattr(memory, 'limit_bytes', lambda device: int(0.7 * need))
  # Of all that is tried, one: each is a compile.
  way = {'accumulate': 16}, 'more and smaller micro-batches', True
  assert way in here.changes_of(small(), devices=1)
  monkeypatch.setattr(here, 'changes_of', lambda config, devices: [way])
  before = {id(x) for x in jax.live_arrays()}
  with pytest.raises(ValueError) as error:
    train(small(), tmp_path / 'run', devices=jax.devices()[:1])
  sentence, line = str(error.value).split('\n')
  assert 'nothing was allocated' in sentence
  assert f'needs {need / 2**20:.2f} MiB' in sentence
  assert line.startswith('  --config.accumulate=16  needs ')
  assert 'fits; more and smaller' in line
  new = [x for x in jax.live_arrays() if id(x) not in before]
  assert sum(x.nbytes for x in new) < 64  # Random keys.
  # The way out is another config: it must not find the directory taken.
  assert not (tmp_path / 'run' / 'config.json').exists()


def command(*flags, program=('-m', 'memjax.plan')):
  return subprocess.run(
    [sys.executable, *program, *flags],
    cwd=launch.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'COLUMNS': '100'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ('flags', 'sentence'),
  [
    (['--target=v5e:1x'], "there is no target 'v5e:1x'; the nearest is 'v5e:1x1'"),
    (['--target=v5e:2x2', '--config.mesh.fsdp=3'], 'takes 3 devices, but there are 4'),
    (['--target=cpu', '--plot=plan.foo'], 'plan.foo: pictures end in one of .'),
  ],
)
def test_the_command_refuses_in_a_sentence(flags, sentence):
  done = command(f'--config={SMOKE}', *flags)
  assert done.returncode == 1
  assert sentence in done.stderr
  assert 'Traceback' not in done.stderr


def test_targets_are_listed_without_a_config():
  done = command('--list-targets')
  assert done.returncode == 0, done.stderr
  assert {'rtx4090', 'v5e:1x1', 'h100-80g'} <= set(done.stdout.replace('│', ' ').split())


def test_one_plan_through_the_command_and_a_child(tmp_path):
  """The smallest model there is, for a TPU: table, JSON and picture."""
  pytest.importorskip('libtpu')
  small = [f'--config.model_args={dict(layers=1, loss_chunk=64)}', '--config.accumulate=1']
  files = [f'--json={tmp_path}/plan.json', f'--plot={tmp_path}/plan.png']
  sgd = ['--config.optimizer.name=sgd', '--config.batch_size=2']
  done = command(f'--config={SMOKE}', '--target=v5e:1x1', *small, *sgd, *files)
  assert done.returncode == 0, done.stderr
  assert 'v5e:1x1: fits' in done.stdout
  (found,) = json.loads((tmp_path / 'plan.json').read_text())
  assert {'target', 'fits', 'limit_bytes', 'peak_bytes', 'host_bytes', 'parts'} <= found.keys()
  assert {'collectives', 'compile_seconds'} <= found.keys()
  assert sum(found['parts'].values()) == found['peak_bytes']
  with Image.open(tmp_path / 'plan.png') as picture:
    picture.verify()


# One layer, without optimizer state: seconds to compile for the CPU.
LEAST = [
  f'--config={SMOKE}',
  f'--config.model_args={dict(layers=1, loss_chunk=64)}',
  *('--config.accumulate=1', '--config.optimizer.name=sgd', '--config.batch_size=8'),
  '--target=cpu',
]


@pytest.mark.slow
def test_one_bad_target_hides_no_other():
  flags = [*LEAST[:-1], '--plan=cpu', '--plan=v5']
  done = command(*flags, program=('run.py',))
  assert done.returncode == 1
  assert 'cpu: fits' in done.stdout
  assert "there is no target 'v5'" in done.stderr


@pytest.mark.slow
def test_ways_are_compared_through_the_command(tmp_path):
  files = [f'--json={tmp_path}/rows.json', f'--plot={tmp_path}/trade.png']
  done = command(*LEAST, '--recommend', '--compiles=2', *files)
  assert done.returncode == 0, done.stderr
  assert '2 of ' in done.stdout
  rows = json.loads((tmp_path / 'rows.json').read_text())
  assert {(row['method'], row['target']) for row in rows} == {('sgd', 'cpu'), ('adamw', 'cpu')}
  with Image.open(tmp_path / 'trade.png') as picture:
    picture.verify()


SEARCH = """
import runpy
from memjax.plan import search, targets
def largest_batch(config, target, say):
  targets.parse(target)
  say(8, 'cpu: fits')
  return 8, {'target': target, 'notes': ['a note']}
search.largest_batch = largest_batch
runpy.run_module('memjax.plan', run_name='__main__', alter_sys=True)
"""


def test_the_largest_batch_is_told_by_the_command(tmp_path):
  """Over a made-up search; another target that fails does not take the answer along."""
  flags = [*LEAST, '--target=v5', '--search=batch', f'--json={tmp_path}/batch.json']
  done = command(*flags, program=('-c', SEARCH))
  assert done.returncode == 1
  assert "there is no target 'v5'" in done.stderr
  assert json.loads((tmp_path / 'batch.json').read_text()) == [
    {'target': 'cpu', 'notes': ['a note'], 'batch_size': 8}
  ]
  for words in ('batch 8  cpu: fits', '--config.batch_size=8', 'a note'):
    assert words in done.stdout


def test_a_step_of_ones_own_is_planned_part_by_part(tmp_path):
  """Compiled here, for this machine; the package is its function."""
  optimizer = optax.adam(1e-3)
  params = {'w': jnp.zeros((64, 32))}
  state = jax.eval_shape(lambda: {'params': params, 'opt': optimizer.init(params)})

  def step(state, batch):
    grads = jax.grad(lambda p: jnp.mean((batch['x'] @ p['w']) ** 2))(state['params'])
    updates, opt = optimizer.update(grads, state['opt'])
    return {'params': optax.apply_updates(state['params'], updates), 'opt': opt}

  batch = {'x': jax.ShapeDtypeStruct((8, 64), jnp.float32)}
  jitted = jax.jit(step, donate_argnums=0)
  # A machine of eight virtual devices: the shapes say how they lie on them.
  whole = jax.sharding.NamedSharding(sharding.make_mesh(), jax.sharding.PartitionSpec())
  state, batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (state, batch)
  )
  found = memjax.plan.plan_step(jitted, state, batch, 'local', cache_dir=tmp_path)
  parts = found['parts']
  assert (parts['parameters'], parts['moments'], parts['batch']) == (8192, 2 * 8192, 2048)
  assert parts['other_state'] == 4
  assert parts['gradients'] <= 8192
  assert sum(parts.values()) == found['peak_bytes']


def test_the_package_is_called_as_its_function():
  with pytest.raises(ValueError, match="no target 'v5'"):
    memjax.plan(config.load(SMOKE), targets=['v5'])
