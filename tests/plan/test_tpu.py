"""Programs compiled for TPUs that are not here, by libtpu."""

import time

import jax
import pytest
from jax.experimental import topologies

from memjax import build, config, plan, sharding
from tests import hlo

pytest.importorskip('libtpu')


def build_for(target, spec, **changes):
  """Builds a config for a TPU slice, all of it `fsdp`."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=target).devices
  c = config.load(spec).unlock()
  c.update(changes)
  return build.build(c, sharding.make_mesh(1, -1, 1, devices=devices))


def compile_for(target, spec, **changes):
  """Compiles the training step of a config for a TPU slice."""
  parts = build_for(target, spec, **changes)
  started = time.monotonic()
  compiled = parts.step.lower(parts.state, parts.batch).compile()
  return parts, compiled, time.monotonic() - started


def moved_matrices(compiled, parts):
  """Collectives as large as a whole matrix of a block, by kind and sorted shape."""
  sizes = {
    x.size // x.shape[0] for x in jax.tree.leaves(parts.state['params']['blocks']) if x.ndim > 2
  }
  found = [c for c in hlo.collectives(compiled.as_text()) if hlo.elements(c) in sizes]
  return {(c.kind, tuple(sorted(size for size in c.shape if size > 1))) for c in found}


@pytest.mark.slow
def test_galore_moves_no_matrix_that_plain_descent_does_not():
  """Eight-way fsdp: weights are gathered and gradients reduced in both; the basis adds nothing."""
  small = dict(model='llama_9m', batch_size=16, accumulate=1, remat='full')
  spec = 'configs/galore_llama60m.py:smoke'
  c = config.load(spec)
  c.optimizer.rank = 24
  parts, galore, _ = compile_for('v5e:2x4', spec, optimizer=c.optimizer, **small)
  plain = config.optimizer('sgd', learning_rate=0.1)
  _, sgd, _ = compile_for('v5e:2x4', spec, optimizer=plain, **small)
  moved = moved_matrices(galore, parts)
  assert moved  # The reader sees the gathers of the weights.
  assert moved <= moved_matrices(sgd, parts)


@pytest.mark.slow
def test_a_1b_step_compiles_for_one_v5e_and_fits():
  """24 layers, rank 512, bfloat16, rematerialised, batch 1 x 256."""
  c = config.load('configs/galore_llama1b.py').unlock()
  c.update(batch_size=1, accumulate=1)
  (found,) = plan.plan(c, ['v5e:1x1'], cache_dir='')
  print(f'compiled in {found["compile_seconds"]:.0f} s, peak {found["peak_bytes"] / 2**30:.2f} GiB')
  assert found['fits']
  assert found['parts']['compiler_reserved'] < 0.01 * found['peak_bytes']
  assert found['compile_seconds'] < 90
