"""Checkpoints of a run of two processes with two CPU devices each."""

import os
import pathlib
import socket
import subprocess
import sys

RUN = """
import os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
process, port, directory = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{port}', 2, process)

from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from memjax.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, P('fsdp'))

def values(seed):  # Too big, when compressed, to be stored within the index.
  return np.random.default_rng(seed).standard_normal((8, 4096), np.float32)

def state(seed):
  return {'x': jax.make_array_from_callback((8, 4096), rows, lambda index: values(seed)[index])}

abstract = {'x': jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=rows)}

def check(step, seed):
  restored = ckpt.restore(abstract)
  assert (restored.step, restored.metadata) == (step, {'seed': seed}), restored
  for shard in restored.state['x'].addressable_shards:
    np.testing.assert_array_equal(shard.data, values(seed)[shard.index])

with Checkpoints(directory, every=1) as ckpt:
  assert ckpt.restore(abstract) is None
  for step in (1, 2):
    ckpt.maybe_save(state(step), step, {'seed': step})
  check(2, 2)
  if process == 0:  # What process 1 wrote and only process 1 reads.
    for file in (directory / '2/state/ocdbt.process_1/d').iterdir():
      file.unlink()
  multihost_utils.sync_global_devices('damage')
  check(1, 1)
  assert (directory / 'damaged_2').exists() and ckpt.steps() == [1]
  assert ckpt.maybe_save(state(3), 2, {'seed': 3})
  check(2, 3)
"""


def test_processes_agree_on_what_is_damaged(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=os.pathsep.join(sys.path))
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  runs = []
  for i, log in enumerate(logs):
    command = [sys.executable, '-c', RUN, str(i), port, str(tmp_path / 'checkpoints')]
    with open(log, 'w') as file:
      runs.append(subprocess.Popen(command, stdout=file, stderr=file, env=env))
  try:
    codes = [run.wait(timeout=120) for run in runs]
  finally:
    for run in runs:
      run.kill()
  assert codes == [0, 0], ''.join(pathlib.Path(log).read_text()[-3000:] for log in logs)
  assert 'another process could not read it' in logs[0].read_text()
