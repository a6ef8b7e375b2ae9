"""Bytes that compiled programs communicate, against small programs whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from memjax.plan import collectives, targets

P = PartitionSpec
BLOCK = 16 * 128 * 4  # Bytes of f32[16, 128], what one device holds below.


def compiled_text(body, devices=None, rows=16):
  """Compiles `body`, which sees f32[rows, 128] on each device of a mesh with the axis x."""
  devices = jax.devices()[:4] if devices is None else devices
  mesh = Mesh(np.asarray(devices), ('x',))
  f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P('x'), out_specs=P('x'), check_vma=False))
  sharding = jax.sharding.NamedSharding(mesh, P('x'))
  x = jax.ShapeDtypeStruct((rows * len(devices), 128), jnp.float32, sharding=sharding)
  return f.lower(x).compile().as_text()


def shift(x):
  return jax.lax.ppermute(x, 'x', [(i, (i + 1) % 4) for i in range(4)])


ONE = {
  'all-reduce': (lambda x: jax.lax.psum(x, 'x'), BLOCK),
  'all-gather': (lambda x: jax.lax.all_gather(x, 'x', tiled=True), 4 * BLOCK),
  'reduce-scatter': (lambda x: jax.lax.psum_scatter(x, 'x', tiled=True), BLOCK),
  'all-to-all': (lambda x: jax.lax.all_to_all(x, 'x', 0, 0, tiled=True), BLOCK),
  'collective-permute': (shift, BLOCK),
}


@pytest.mark.parametrize('kind', ONE)
def test_one_collective_counts_its_whole_array(kind):
  body, size = ONE[kind]
  assert collectives.count(compiled_text(body)) == {kind: size}


def looped(x, turns=5):
  return jax.lax.fori_loop(0, turns, lambda _, y: jax.lax.psum(y, 'x') / 4 + 1, x)


def nested(x):
  return jax.lax.fori_loop(0, 3, lambda _, y: looped(y) - 1, x)


@pytest.mark.parametrize(('body', 'turns'), [(looped, 5), (nested, 15)])
def test_a_loop_counts_as_often_as_it_turns(body, turns):
  text = compiled_text(body)
  assert collectives.count(text) == {'all-reduce': turns * BLOCK}
  assert collectives.unknown_loops(text) == []


def test_a_loop_that_ends_by_its_data_counts_once_and_is_named():
  def body(x):
    return jax.lax.while_loop(lambda y: jnp.max(y) < 100, lambda y: jax.lax.psum(y, 'x'), x)

  text = compiled_text(body)
  assert collectives.count(text) == {'all-reduce': BLOCK}
  (name,) = collectives.unknown_loops(text)
  assert f'%{name} = ' in text


def test_of_branches_the_one_that_moves_most_counts():
  def body(x):
    gather = lambda y: jax.lax.all_gather(y, 'x', tiled=True)[:16] + jax.lax.psum(y, 'x')
    return jax.lax.cond(jax.lax.psum(x[0, 0], 'x') > 0, gather, shift, x)

  moved = collectives.count(compiled_text(body))
  assert moved == {'all-gather': 4 * BLOCK, 'all-reduce': BLOCK + 4}


def test_a_tpu_program_counts_the_same():
  """Its loops carry no count of turns, and its collectives run beside other work."""
  pytest.importorskip('libtpu')
  devices = targets.open_devices(targets.parse('v5e:2x2'))

  def body(x):
    gathered = jax.lax.all_gather(x, 'x', tiled=True)
    y = jnp.dot(gathered, jnp.ones((128, 128)), precision='highest')  # Else in bfloat16.
    return looped(jax.lax.psum_scatter(y, 'x', tiled=True))

  assert collectives.count(compiled_text(body, devices, rows=256)) == {
    'all-reduce': 5 * 16 * BLOCK,
    'all-gather': 4 * 16 * BLOCK,
    'reduce-scatter': 4 * 16 * BLOCK,
  }


# As XLA's GPU compiler writes it: tuples of operands and results, names for groups of devices.
ASYNCHRONOUS = """
HloModule jit_f

%wrapped (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %scatter = bf16[2,4]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

ENTRY %main (a: bf16[8,4], b: f32[6]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = f32[6]{0} parameter(1)
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), channel_id=1, dimensions={0}
  %done = bf16[32,4]{1,0} all-gather-done(%start)
  %two = ((bf16[8,4]{1,0}, f32[6]{0}), (bf16[8,4]{1,0}, f32[6]{0})) all-reduce-start(%a, %b)
  %both = (bf16[8,4]{1,0}, f32[6]{0}) all-reduce-done(%two)
  %move = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]) collective-permute-start(%a)
  %moved = bf16[8,4]{1,0} collective-permute-done(%move)
  %s = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) reduce-scatter-start(%a), replica_groups=mesh['x'=4] {'x'}
  %sd = bf16[2,4]{1,0} reduce-scatter-done(%s)
  %w = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}, s32[]) async-start(%a), calls=%wrapped
  %wd = bf16[2,4]{1,0} async-done(%w)
  ROOT %out = bf16[8,4]{1,0} copy(%moved)
}
"""


def test_a_start_and_its_done_are_one():
  assert collectives.count(ASYNCHRONOUS) == {
    'all-reduce': 64 + 24,
    'all-gather': 256,
    'reduce-scatter': 64 + 64,
    'collective-permute': 64,
  }
