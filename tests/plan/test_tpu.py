"""Programs compiled for TPUs that are not here, by libtpu."""

import collections
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from memjax import build, config, optimizers, plan, sharding
from memjax.plan import collectives
from tests import hlo

pytest.importorskip('libtpu')


@functools.cache
def mesh_of(target):
  """A TPU slice, all of it `fsdp`; another call for its devices would be given others."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=target).devices
  return sharding.make_mesh(1, -1, 1, devices=devices)


def build_for(target, spec, **changes):
  """Builds a config for a TPU slice."""
  c = config.load(spec).unlock()
  c.update(changes)
  return build.build(c, mesh_of(target))


def compile_for(target, spec, **changes):
  """Compiles the training step of a config for a TPU slice."""
  parts = build_for(target, spec, **changes)
  started = time.monotonic()
  compiled = parts.step.lower(parts.state, parts.batch).compile()
  return parts, compiled, time.monotonic() - started


def counted_matrices(compiled, parts):
  """How often the program moves as much as a matrix of a block, by kind, dtype, sorted shape."""
  blocks = jax.tree.leaves(parts.state['params']['blocks'])
  sizes = {x.size // x.shape[0] for x in blocks if x.ndim > 2}
  found = [c for c in hlo.collectives(compiled.as_text()) if hlo.elements(c) in sizes]
  shape = lambda c: tuple(sorted(size for size in c.shape if size > 1))
  return collections.Counter((c.kind, c.dtype, shape(c)) for c in found)


def moved_matrices(compiled, parts):
  """Collectives as large as a whole matrix of a block, by kind and sorted shape."""
  return {(kind, shape) for kind, _, shape in counted_matrices(compiled, parts)}


class Moved(NamedTuple):
  """What a step sends under eight-way fsdp."""

  bytes: dict[str, int]  # By kind of collective, loops as often as they run.
  matrices: collections.Counter


def moved_by(optimizer):
  """Compiles the step of a small model, bfloat16 throughout."""
  small = dict(model='llama_9m', batch_size=16, accumulate=1, remat='full', optimizer=optimizer)
  parts, compiled, _ = compile_for('v5e:2x4', 'configs/galore_llama60m.py:smoke', **small)
  return Moved(collectives.count(compiled.as_text()), counted_matrices(compiled, parts))


@functools.cache
def plain_descent():
  """Weights are gathered and gradients scattered, summed; nothing else."""
  return moved_by(config.optimizer('sgd', learning_rate=0.1))


@functools.cache
def galore():
  optimizer = config.load('configs/galore_llama60m.py:smoke').optimizer
  optimizer.rank = 24
  return moved_by(optimizer)


def more_than_plain(moved):
  """Bytes beyond those of plain descent, over those of its gradient."""
  plain = plain_descent().bytes
  more = (max(0, size - plain.get(kind, 0)) for kind, size in moved.bytes.items())
  return sum(more) / plain['reduce-scatter']


@pytest.mark.slow
def test_galore_moves_little_beyond_weights_and_gradient():
  """Projections and bases, at rank 24 of 128."""
  assert more_than_plain(galore()) < 1 / 4


@pytest.mark.slow
def test_galore_moves_no_matrix_that_plain_descent_does_not():
  assert plain_descent().matrices  # The reader sees the gathers of the weights.
  assert galore().matrices <= plain_descent().matrices


@pytest.mark.slow
def test_a_gathered_gradient_is_seen(monkeypatch):
  """It is summed on every device, which moves arrays of the same shapes in another way."""

  def gathering(learning_rate, momentum=0.0):
    def gather(gradient, _):
      whole = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, everywhere), gradient)
      return jax.tree.map(lambda x: x / jnp.linalg.norm(x), whole)

    return optax.chain(optax.stateless(gather), optax.sgd(learning_rate, momentum))

  plain_descent()  # Before another takes its name.
  everywhere = NamedSharding(mesh_of('v5e:2x4'), PartitionSpec())
  monkeypatch.setitem(optimizers.OPTIMIZERS, 'sgd', gathering)
  assert more_than_plain(moved_by(config.optimizer('sgd', learning_rate=0.1))) > 1


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
