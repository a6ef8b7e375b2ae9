"""Whole runs through the real command: killed, stopped, damaged, resumed; and what they leave.

One run is left alone; another of the same config goes through every accident in turn. Both must
end with the same bits. Runs share compiled programs through JAX's cache on disk.
"""

import json
import shutil
import signal
import types

import jax
import launch
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memjax import config as config_lib
from memjax import sharding
from memjax.build import build
from memjax.checkpoint import Checkpoints
from memjax.train import train, use_cpu_devices

STEPS = 16
FLAGS = (
  f'--config.steps={STEPS}',
  '--config.eval_every=4',
  '--config.checkpoint.every=4',
  '--config.checkpoint.keep=9',
  '--config.optimizer.refresh_every=3',  # Bases change on both sides of every accident.
)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return launch.once(tmp_path_factory, 'cache', lambda directory: None)


@pytest.fixture(scope='module')
def alone(cache, tmp_path_factory):
  """The run that nothing happens to."""

  def make(workdir):
    done = launch.run(workdir, *FLAGS, cache=cache)
    assert done.returncode == 0, done.stderr

  return launch.once(tmp_path_factory, 'alone', make)


@pytest.fixture(scope='module')
def ordeal(alone, cache, tmp_path_factory):
  """The run that everything happens to: its work directory, and what each start of it did."""

  def make(directory):
    workdir = directory / 'run'
    starts = {}

    def go(name, **how):
      done = launch.run(workdir, *FLAGS, cache=cache, **how)
      starts[name] = dict(
        code=done.returncode,
        out=done.stdout,
        err=done.stderr,
        checkpoints=launch.checkpoints(workdir),
        lines=launch.lines(workdir),
      )

    go('killed', moment='step=6', send=signal.SIGKILL, WAIT_FOR_CHECKPOINT='4')
    go('killed in a save', moment='save=8', send=signal.SIGKILL)
    go('interrupted in an evaluation', moment='evaluate=12', send=signal.SIGINT)
    go('stopped', moment='step=14')
    damage(workdir / 'checkpoints' / '14')
    go('finished')
    go('again')
    (directory / 'starts.json').write_text(json.dumps(starts))

  directory = launch.once(tmp_path_factory, 'ordeal', make)
  starts = json.loads((directory / 'starts.json').read_text())
  return directory / 'run', {name: types.SimpleNamespace(**d) for name, d in starts.items()}


def damage(checkpoint):
  """Flips one bit in the middle of the largest file."""
  file = max((p for p in checkpoint.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def final_state(workdir):
  c = config_lib.load(launch.SMOKE)
  c.optimizer.refresh_every = 3
  parts = build(c, sharding.make_mesh(devices=jax.devices()[:1]))
  with Checkpoints(workdir / 'checkpoints', every=1) as checkpoints:
    return checkpoints.restore(parts.state)


# ---- Accidents.


def test_killed_and_resumed_gives_the_same_bits(alone, ordeal):
  workdir, _ = ordeal
  a, b = final_state(alone), final_state(workdir)
  assert a.step == b.step == STEPS
  paths = jax.tree_util.tree_leaves_with_path(a.state)
  assert len(paths) > 40
  for (path, x), y in zip(paths, jax.tree.leaves(b.state), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
  assert launch.lines(workdir) == launch.lines(alone)


def test_the_kill_fell_between_checkpoints_and_steps_were_repeated(ordeal):
  _, starts = ordeal
  killed = starts['killed']
  assert killed.code == -signal.SIGKILL
  assert killed.checkpoints == [4]
  assert killed.lines[-1]['step'] == 6
  assert 'Resuming after step 4' in starts['killed in a save'].out


def test_killed_while_a_checkpoint_is_written_leaves_the_one_before(ordeal, alone):
  workdir, starts = ordeal
  killed = starts['killed in a save']
  assert killed.code == -signal.SIGKILL
  assert killed.checkpoints in ([4], [4, 8])
  assert (
    f'Resuming after step {killed.checkpoints[-1]}' in starts['interrupted in an evaluation'].out
  )
  for step in (4, 8, 12, STEPS):
    assert launch.digests(workdir, step) == launch.digests(alone, step)


def test_ctrl_c_in_an_evaluation_gives_it_up_and_the_resumed_run_begins_with_it(ordeal):
  _, starts = ordeal
  stopped = starts['interrupted in an evaluation']
  assert stopped.code == 130, stopped.err
  assert 'Ctrl-C again stops at once' in stopped.err
  assert 'Traceback' not in stopped.err
  assert stopped.checkpoints[-1] == 12
  assert stopped.lines[-1]['step'] == 12
  assert 'train/loss' in stopped.lines[-1]
  assert 'the same command resumes' in stopped.out
  after = starts['stopped'].out.partition('Resuming after step 12')[2].split('\n')
  assert after[1].startswith('step 12  validation loss')


def test_sigterm_saves_within_the_step_and_exits_0(ordeal):
  _, starts = ordeal
  stopped = starts['stopped']
  assert stopped.code == 0, stopped.err
  assert stopped.checkpoints[-1] == 14
  assert stopped.lines[-1]['step'] == 14


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(ordeal):
  workdir, starts = ordeal
  finished = starts['finished']
  assert finished.code == 0
  assert 'checkpoints/14 is damaged' in finished.err
  assert (workdir / 'checkpoints' / 'damaged_14').is_dir()
  assert 'Resuming after step 12' in finished.out


def test_a_finished_run_says_so_and_trains_no_further(ordeal):
  _, starts = ordeal
  again = starts['again']
  assert again.code == 0
  assert f'Finished already after step {STEPS}' in again.out
  assert f'/{STEPS}  loss' not in again.out
  assert again.lines == starts['finished'].lines


@pytest.mark.parametrize(
  ('moment', 'send', 'code'),
  [
    ('import', signal.SIGTERM, 0),
    ('data', signal.SIGTERM, 0),
    ('compile', signal.SIGTERM, 0),
    ('import', signal.SIGINT, 130),
  ],
)
def test_a_signal_before_there_is_anything_to_save_ends_at_once(
  moment, send, code, tmp_path, cache
):
  done = launch.run(tmp_path / 'run', moment=moment, send=send, cache=cache)
  assert done.returncode == code, done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run' / 'checkpoints').exists()


# ---- Another mesh.


@pytest.mark.slow
def test_resuming_on_another_mesh_continues_the_losses(alone, tmp_path):
  """Resumes on 8 devices what one device began, and on 2 x 2 x 2 what 8 began."""
  workdir = tmp_path / 'run'
  shutil.copytree(alone, workdir)
  for mesh, forgotten in (
    (dict(data=1, fsdp=8), (12, 16)),
    (dict(data=2, fsdp=2, tensor=2), (16,)),
  ):
    for step in forgotten:
      shutil.rmtree(workdir / 'checkpoints' / str(step))
    c = in_process('galore', steps=STEPS, eval_every=4)
    c.optimizer.refresh_every = 3
    c.mesh.update(mesh)
    train(c, workdir)
    for kind in ('train/loss', 'eval/loss'):
      expected, found = launch.losses(alone, kind), launch.losses(workdir, kind)
      assert found.keys() == expected.keys()
      # Eight devices add in another order: f32 rounding, and what the updates make of it.
      np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def in_process(method, **fields):
  """The config of the command's runs, to be run in this process."""
  c = config_lib.load(f'{launch.SMOKE},method={method}')
  c.update(fields)
  c.sample.tokens = 0
  c.checkpoint.every, c.checkpoint.keep = 4, 9
  return c


def test_the_first_step_after_a_restore_takes_no_more_memory_than_a_fresh_one(cache, tmp_path):
  """Donation must be real: the step writes over the restored buffers, and over every one."""
  c = in_process('adamw')
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  parts = build(c, mesh)
  with Checkpoints(tmp_path, every=1) as checkpoints:
    checkpoints.maybe_save(parts.init(jax.random.key(0)), 1, {})
    checkpoints.wait()
    state = checkpoints.restore(parts.state).state
  step = parts.step.lower(parts.state, parts.batch).compile()
  leaves = jax.tree.leaves(state)
  before = [x.unsafe_buffer_pointer() for x in leaves]
  batch = {name: np.ones(x.shape, x.dtype) for name, x in parts.batch.items()}
  new, _ = step(state, jax.device_put(batch, jax.tree.map(lambda x: x.sharding, parts.batch)))
  after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(jax.block_until_ready(new))]
  assert all(x.is_deleted() for x in leaves)
  assert sorted(after) == sorted(before)


# ---- What is kept and what is left.


@pytest.mark.slow
def test_the_last_checkpoints_and_every_so_many_are_kept(tmp_path):
  c = in_process('adamw', steps=12, eval_every=0)
  c.checkpoint.update(every=2, keep=2, keep_every=4)
  train(c, tmp_path, devices=jax.devices()[:1])
  assert launch.checkpoints(tmp_path) == [4, 8, 10, 12]


def test_a_work_directory_holds_what_is_promised(alone):
  read = lambda name: json.loads((alone / name).read_text())
  assert read('config.json')['optimizer']['refresh_every'] == 3
  assert read('data.json')['source'] == 'stdlib'
  assert read('memory.json')['parts']['parameters'] > 0
  assert read('memory.json')['compiled']['peak'] > 0
  assert launch.checkpoints(alone) == [4, 8, 12, 16]
  assert (alone / 'sample.txt').read_text().startswith('def ')
  with Image.open(alone / 'loss.png') as picture:
    picture.verify()
  rows = [json.loads(line) for line in (alone / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows if 'train/loss' in row] == list(range(1, STEPS + 1))
  assert [row['step'] for row in rows if 'eval/loss' in row] == [4, 8, 12, 16]
  assert {'throughput/tokens_per_s', 'memory/peak_mib'} <= rows[0].keys()


@pytest.mark.parametrize('name', ['train/loss', 'eval/loss'])
def test_tensorboard_shows_each_step_once_after_every_accident(ordeal, name):
  workdir, _ = ordeal
  events = EventAccumulator(str(workdir)).Reload().Scalars(name)
  assert [e.step for e in events] == sorted(launch.losses(workdir, name))
  np.testing.assert_allclose(
    [e.value for e in events],
    list(launch.losses(workdir, name).values()),
    rtol=1e-7,  # f32, as TensorBoard stores it.
  )


# ---- Inputs that cannot work.


@pytest.mark.parametrize(
  ('spec', 'flags', 'sentence'),
  [
    (launch.SMOKE, ['--config.setps=3'], "no field 'setps'; the nearest is 'steps'"),
    (launch.SMOKE, ['--config.mesh.dat=2'], "no field 'mesh.dat'; the nearest is 'data'"),
    (launch.SMOKE, ['--config.seed.x=2'], 'what is before .x is a single field'),
    (launch.SMOKE, ['--config.steps=abc'], '--config.steps=abc'),
    ('configs/quickstart.py:smok', [], "no argument 'smok'; the nearest is 'smoke'"),
    ('configs/quickstrat.py', [], "there is no config file 'configs/quickstrat.py'"),
    (launch.SMOKE, ['--config.optimizer.rank=0'], 'rank must be a positive int, got 0'),
    ('', [], 'say which experiment'),
  ],
)
def test_the_command_refuses_in_a_sentence(spec, flags, sentence, tmp_path):
  done = launch.run(tmp_path / 'run', *flags, config=spec)
  assert done.returncode == 1
  assert sentence in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def change(**fields):
  """A function that sets fields such as `mesh__fsdp=3` in a config."""

  def apply(c):
    for name, value in fields.items():
      c.update_from_flattened_dict({name.replace('__', '.'): value})

  return apply


@pytest.mark.parametrize(
  ('method', 'changed', 'sentence'),
  [
    ('galore', change(optimizer__rank=0), 'rank must be a positive int, got 0'),
    ('galore', change(optimizer__rank=65), r'blocks/.*: shape .* rank 65'),
    ('adamw', change(mesh__fsdp=3, mesh__data=1), 'takes 3 devices, but there are 8'),
    ('adamw', change(mesh__fsdp=3), 'takes 3 devices or a multiple, but there are 8'),
    ('adamw', change(model_args={'vocab': 511}, mesh__tensor=2), r'shape \(.*511.*config.mesh'),
    ('adamw', change(batch_size=12), 'config.batch_size a multiple of 8'),
    ('adamw', change(model='llama_tny'), 'llama_tiny'),
    ('adamw', change(data__sources=('txt:x',)), "unknown scheme 'txt'; the nearest is 'text'"),
    ('adamw', change(data__sources=('text:/nowhere/*',)), 'no file matches /nowhere'),
    ('adamw', change(model_args={'vocab': 128}), r'config.model_args.vocab to at least 257'),
  ],
)
def test_what_cannot_work_is_refused_before_anything_is_allocated(
  method, changed, sentence, tmp_path
):
  c = in_process(method)
  with c.unlocked():
    changed(c)
  before = {id(x) for x in jax.live_arrays()}
  with pytest.raises(ValueError, match=sentence) as error:
    train(c, tmp_path / 'run')
  assert '\n' not in str(error.value) or 'no data source' in str(error.value)
  new = [x for x in jax.live_arrays() if id(x) not in before]
  assert sum(x.nbytes for x in new) < 64  # Random keys.
  assert not (tmp_path / 'run' / 'checkpoints').exists()
  assert not (tmp_path / 'run' / 'config.json').exists()  # Another config may still have it.


def test_another_number_of_cpu_devices_is_refused_in_a_process_that_has_some():
  use_cpu_devices(len(jax.devices()))
  with pytest.raises(
    ValueError, match='cpu_devices is 3, but this process already uses its CPU as'
  ):
    use_cpu_devices(3)


def test_an_empty_corpus_is_refused(tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  c = in_process('adamw')
  c.data.sources, c.data.cache_dir = (f'text:{tmp_path}/*.txt',), str(tmp_path / 'cache')
  with pytest.raises(ValueError, match='no text'):
    train(c, tmp_path / 'run')


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file' / 'run', '/proc/run'):
    with pytest.raises(ValueError, match=r'cannot be written.*choose another work directory'):
      train(in_process('adamw'), place)


def test_the_work_directory_of_another_config_is_refused(alone):
  c = in_process('galore', steps=STEPS)
  c.optimizer.refresh_every, c.optimizer.rank = 3, 4
  with pytest.raises(ValueError, match=r'optimizer.rank: 8 there, 4 here.*another --workdir'):
    train(c, alone)


def test_checkpoints_of_another_config_are_refused_without_its_file(alone, tmp_path):
  shutil.copytree(alone / 'checkpoints', tmp_path / 'checkpoints')
  c = in_process('galore', steps=STEPS)
  c.optimizer.refresh_every, c.optimizer.learning_rate = 3, 0.5
  with pytest.raises(ValueError, match=r'optimizer.learning_rate: 0.01 there, 0.5 here'):
    train(c, tmp_path, devices=jax.devices()[:1])


def test_the_work_directory_of_other_data_is_refused(alone, tmp_path):
  c = in_process('galore', steps=STEPS)
  c.optimizer.refresh_every = 3
  shutil.copy(alone / 'config.json', tmp_path)
  record = json.loads((alone / 'data.json').read_text())
  (tmp_path / 'data.json').write_text(json.dumps(record | {'train_tokens': 1}))
  with pytest.raises(ValueError, match='began with data train_tokens 1 and now finds'):
    train(c, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
  c = in_process('adamw', steps=4, eval_every=0, log_every=4)
  c.optimizer.learning_rate = 1e30
  c.checkpoint.every = 1
  with pytest.raises(FloatingPointError, match=r'train/\w+ is \w+ after step 2; .*learning_rate'):
    train(c, tmp_path, devices=jax.devices()[:1])
  assert launch.checkpoints(tmp_path) == [1]
