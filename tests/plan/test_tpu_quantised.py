"""An update of quantised state, compiled by libtpu: whole moments never exist in f32."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from memjax import optimizers, sharding

pytest.importorskip('libtpu')

# Stacked layers go one at a time, a large matrix of one layer in slices of half a million numbers.
SHAPES = {'blocks': {'kernel': (8, 512, 1024)}, 'embed': {'embedding': (8192, 512)}}


@pytest.mark.parametrize('name', ['adamw8bit', pytest.param('adam4bit', marks=pytest.mark.slow)])
def test_an_update_holds_a_slice_of_its_moments_in_f32(name):
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:1x1').devices
  mesh = sharding.make_mesh(1, -1, 1, devices=devices)
  where = NamedSharding(mesh, PartitionSpec())
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  is_shape = lambda x: isinstance(x, tuple)
  params = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where), SHAPES, is_leaf=is_shape
  )
  layout = sharding.layout(params, jax.tree.map(lambda _: where, params))
  optimizer = optimizers.OPTIMIZERS[name](1e-3, layout=layout)

  def step(held, gradient):
    params, opt = held
    updates, opt = optimizer.update(gradient, opt, params)
    return optax.apply_updates(params, updates), opt

  opt = jax.tree.map(shape, jax.eval_shape(optimizer.init, params))
  compiled = jax.jit(step, donate_argnums=0).lower((params, opt), params).compile()
  memory = compiled.memory_analysis()
  largest = max(x.size for x in jax.tree.leaves(params))
  # Room for slices, but not for half of one moment of one leaf in f32.
  assert memory.temp_size_in_bytes < 4 * largest / 2
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, opt)))
  assert memory.alias_size_in_bytes >= held
