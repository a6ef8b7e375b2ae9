"""State in 8 and 4 bits: which leaves, how many bytes, what the updates are, where it lives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from memjax import sharding, transforms
from memjax.transforms import blockwise, codes, slices
from tests import hlo

KINDS = [(8, 'dynamic'), (4, 'dynamic'), (8, 'linear'), (4, 'linear'), (8, 'fp8')]


def adam(bits=8, kind='dynamic', block_size=256, **options):
  return transforms.quantize_state(optax.scale_by_adam(), bits, kind, block_size, **options)


def normal(params, seed):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return tree.unflatten(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves))


# (bits, kind, block) -> after 10 and after 100 updates p[0], p[4095] and the sum of |p|. Adam with
# torchao's rounding on 8192 numbers, from a NumPy transcription of its order of operations.
RUNS = {
  (8, 'dynamic', 256): [(-0.085713, -0.110929, 660.901), (-0.088356, -0.048126, 695.932)],
  (4, 'dynamic', 128): [(-0.042125, -0.106970, 631.965), (-0.032682, -0.085606, 673.660)],
  (8, 'fp8', 256): [(-0.089395, -0.111616, 661.010), (-0.080617, -0.075531, 695.504)],
}


@pytest.mark.parametrize(('bits', 'kind', 'block'), RUNS)
def test_a_run_follows_the_published_one(bits, kind, block):
  k = np.arange(8192)
  params = jnp.asarray(0.1 * np.sin(k), jnp.float32)
  optimizer = optax.chain(adam(bits, kind, block), optax.scale(-0.01))

  @jax.jit
  def update(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for t in range(1, 101):
    gradient = 0.01 * (1 + k % 7) * np.sin(0.7 * (k + 1) + 0.3 * t)
    params, state = update(params, state, jnp.asarray(gradient, jnp.float32))
    found = np.asarray([params[0], params[4095], jnp.sum(jnp.abs(params))])
    if t == 1:
      # The first update does not see the rounding of the state: f32 Adam's.
      np.testing.assert_allclose(found, [-0.01, -0.109782, 524.015], rtol=1e-5)
    # optax's bias correction keeps five digits, 1 - 0.999**t in f32.
    if t in (10, 100):
      np.testing.assert_allclose(
        found[:2], RUNS[bits, kind, block][t == 100][:2], rtol=1e-5, atol=2e-6
      )
      # In another order of sums, or in f64, up to four of the 8,192 numbers round the other way
      # near a midpoint and move the sum by 0.005.
      np.testing.assert_allclose(found[2], RUNS[bits, kind, block][t == 100][2], rtol=2e-5)


@pytest.mark.parametrize(('bits', 'kind'), KINDS)
def test_leaves_of_the_state_and_their_bytes(bits, kind):
  params = {
    'w': jnp.zeros((3, 64, 512), jnp.bfloat16),
    'odd': jnp.zeros((512, 33)),  # Blocks along the axis that has divisors.
    'bias': jnp.zeros(4095),
    'none': jnp.zeros((257, 263)),  # Two primes.
  }
  state = jax.eval_shape(adam(bits, kind).init, params)
  dtype = jnp.float8_e4m3fn if kind == 'fp8' else jnp.uint8
  for moment, scales in ((state.inner.mu, state.scales.mu), (state.inner.nu, state.scales.nu)):
    assert moment['w'].dtype == moment['odd'].dtype == dtype
    assert moment['w'].shape == (3, 64, 512 * bits // 8)
    assert scales['w'].shape == (3, 64, 2)
    assert moment['odd'].shape == (512 * bits // 8, 33)
    assert scales['odd'].shape == (2, 33)
    for name in ('bias', 'none'):
      assert moment[name].dtype == jnp.float32
      assert moment[name].shape == params[name].shape
      assert isinstance(scales[name], optax.MaskedNode)
  assert state.inner.count.dtype == jnp.int32
  count = lambda *names: sum(params[name].size for name in names)
  quantised = 2 * count('w', 'odd') * codes.block_bytes(bits, 256)
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert total == quantised + 8 * count('bias', 'none') + 4


@pytest.mark.parametrize(('bits', 'kind'), KINDS)
@pytest.mark.parametrize('axis', [-1, -2])
def test_an_array_survives_to_half_a_step_of_its_block(bits, kind, axis):
  x = (
    jax.random.normal(jax.random.key(0), (3, 64, 128)) * 10.0 ** jnp.arange(-30, -27)[:, None, None]
  )
  x = x.at[0, :8].set(0).at[1, 5, 7].set(-1.0)
  code = codes.make(kind, bits, signed=True)
  packed = blockwise.quantise(x, blockwise.Blocks(axis, 32), code)
  back = blockwise.dequantise(packed, code)
  np.testing.assert_array_equal(back[0, :8], 0)
  magnitudes = jnp.repeat(packed.scales, 32, axis)
  # Half the widest gap of each map; the extreme itself has a code, but for -1 in dynamic maps.
  widest = {(8, 'fp8'): 1 / 28, (8, 'linear'): 1 / 254, (4, 'linear'): 1 / 14}
  bound = widest.get((bits, kind), 0.0071 if bits == 8 else 0.1126)
  assert jnp.all(jnp.abs(back - x) <= bound * 1.0001 * magnitudes)
  assert jnp.any(jnp.abs(back - x) > bound / 4 * magnitudes)


# Cut into rows of layers along blocks, and into whole blocks across them.
@pytest.mark.parametrize(
  ('bits', 'kind', 'shape', 'dtype', 'ulp'),
  [
    pytest.param(8, 'dynamic', (3, 64, 64), 'bfloat16', 2**-7, marks=pytest.mark.slow),
    (4, 'linear', (2, 128, 33), 'float32', 1e-6),
  ],
)
def test_slices_give_the_bits_of_the_whole(bits, kind, shape, dtype, ulp, monkeypatch):
  params = {'w': jnp.ones(shape, dtype), 'b': jnp.ones(8)}
  state = adam(bits, kind, 64).init(params)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  shardings = sharding.param_shardings(params, [('', PartitionSpec())], mesh)
  cut = adam(bits, kind, 64, layout=sharding.layout(params, shardings))
  whole, loops = state, state
  update_whole, update_loops = jax.jit(adam(bits, kind, 64).update), jax.jit(cut.update)
  for step in range(2):
    gradient = normal(params, step)
    monkeypatch.setattr(slices, 'NUMBERS', 2**19)
    expected, whole = update_whole(gradient, whole)
    monkeypatch.setattr(slices, 'NUMBERS', 1024)
    updates, loops = update_loops(gradient, loops)
    # Compiled apart, products and sums may contract otherwise: an ulp of f32, or of bf16.
    as_f32 = lambda x: np.asarray(x, np.float32)
    np.testing.assert_allclose(as_f32(updates['w']), as_f32(expected['w']), rtol=ulp, atol=1e-6)
    np.testing.assert_allclose(updates['b'], expected['b'], rtol=1e-6)
  program = update_loops.lower(gradient, loops).as_text()
  assert program.count('while') > 0 == update_whole.lower(gradient, whole).as_text().count('while')
  same = [
    np.mean(np.asarray(x) == np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (whole, loops)))
  ]
  assert min(same) > 0.99


def test_only_elementwise_transforms_are_cut(monkeypatch):
  """A clip by the global norm sees all leaves at once; slice by slice it would clip each."""
  monkeypatch.setattr(slices, 'NUMBERS', 1024)
  clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
  params = {'w': jnp.ones((8, 32, 64)), 'v': jnp.ones((8, 32, 64))}
  optimizer = transforms.quantize_state(clipped)
  state, reference = optimizer.init(params), clipped.init(params)
  updates, _ = jax.jit(optimizer.update)(params, state)
  expected, _ = clipped.update(params, reference)
  jax.tree.map(np.testing.assert_allclose, updates, expected)
  for inner in (
    optax.scale_by_adam(),
    optax.scale_by_lion(),
    optax.trace(0.9),
    optax.scale_by_rms(),
  ):
    assert slices.is_elementwise(inner.update, params, inner.init(params))
  for inner in (clipped, optax.contrib.scale_by_muon()):
    assert not slices.is_elementwise(inner.update, params['w'][0], inner.init(params['w'][0]))


SHAPES = {'blocks': {'kernel': (8, 512, 1024)}, 'embed': (8192, 256), 'scale': (8, 512)}
RULES = (
  ('kernel', PartitionSpec(None, 'fsdp', 'tensor')),
  ('embed', PartitionSpec('tensor', 'fsdp')),
  ('', PartitionSpec()),
)


@functools.cache
def compiled(devices, bits):
  """An update of three leaves with donated gradients and state, and its state's shapes."""
  mesh = sharding.make_mesh(
    1, max(devices // 2, 1), min(devices, 2), devices=jax.devices()[:devices]
  )
  params = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
  )
  where = sharding.param_shardings(params, RULES, mesh)
  optimizer = adam(bits, layout=sharding.layout(params, where))
  state = jax.eval_shape(optimizer.init, params)
  state_where = sharding.state_shardings(state, params, where)
  place = lambda tree, where: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
  )
  update = jax.jit(optimizer.update, donate_argnums=(0, 1), out_shardings=(where, state_where))
  return update.lower(place(params, where), place(state, state_where)).compile(), state, state_where


@pytest.mark.parametrize('bits', [8, 4])
def test_no_f32_copy_of_a_leaf_is_held(bits):
  program, _, _ = compiled(1, bits)
  largest = 4 * 8 * 512 * 1024
  # Some slices of 2 MiB; the two moments whole would be 32 MiB, and the gradient is overwritten.
  assert program.memory_analysis().temp_size_in_bytes < 12 * 2**20 < largest


def test_a_sharded_update_moves_nothing():
  program, state, where = compiled(8, 8)
  assert not hlo.collectives(program.as_text())
  # 256 / 4 numbers of an embedding on each device: its blocks are not longer.
  assert state.scales.mu['embed'].shape == (8192, 4)
  assert (
    where.scales.mu['embed'].spec == where.inner.mu['embed'].spec == PartitionSpec('tensor', 'fsdp')
  )
  assert where.scales.nu['blocks']['kernel'].spec == PartitionSpec(None, 'fsdp', 'tensor')


def test_sharded_equals_unsharded():
  params = {'w': jnp.zeros((4, 64, 256))}
  mesh = sharding.make_mesh(1, 4, 2)
  where = sharding.param_shardings(params, [('', PartitionSpec(None, 'fsdp', 'tensor'))], mesh)
  optimizer = adam(block_size=128, layout=sharding.layout(params, where))
  state = optimizer.init(params)
  sharded = jax.device_put(state, sharding.state_shardings(state, params, where))
  update = jax.jit(optimizer.update)
  for step in range(3):
    gradient = normal(params, step)
    expected, state = update(gradient, state)
    updates, sharded = update(jax.device_put(gradient, where), sharded)
    np.testing.assert_allclose(updates['w'], expected['w'], rtol=1e-6, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, sharded, state)


@pytest.mark.parametrize('bits', [8, 4])
def test_explicit_axes_keep_the_layout_and_no_block_straddles_devices(bits):
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  spec = PartitionSpec(None, 'fsdp', 'tensor')
  with jax.set_mesh(mesh):
    params = {'w': jax.device_put(jnp.ones((4, 64, 256)), jax.NamedSharding(mesh, spec))}
    optimizer = adam(bits)
    state = optimizer.init(params)
    assert state.scales.mu['w'].shape == (4, 64, 2)  # A block is 128, all a device has of a row.
    update = jax.jit(optimizer.update).lower(params, state).compile()
    assert not hlo.collectives(update.as_text())
    updates, after = update(params, state)
  assert updates['w'].sharding.spec == spec
  for tree in (state, after):
    moments = jax.tree.leaves((tree.inner.mu, tree.inner.nu, tree.scales))
    assert all(x.sharding.spec == spec for x in moments)
  np.testing.assert_allclose(updates['w'], 1.0, rtol=1e-5)


def test_a_layer_alone_is_updated_as_in_the_stack():
  params = {'blocks': {'kernel': jnp.zeros((3, 64, 256))}}
  optimizer = adam()
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(2):
    before, gradient = state, normal(params, step)
    updates, state = update(gradient, before)
  one = lambda tree: jax.tree.map(lambda x: x[1] if x.ndim else x, tree)
  alone, after = jax.jit(optimizer.update)(one(gradient), one(before))
  jax.tree.map(np.testing.assert_array_equal, (alone, after), (one(updates), one(state)))


def test_moments_in_a_subspace_are_quantised():
  # The exact SVD compiles in half the time.
  options = {'refresh_every': 2, 'basis': transforms.svd()}
  optimizer = transforms.project(adam(min_size=256), 8, **options)
  plain = transforms.project(optax.scale_by_adam(), 8, **options)
  params = {'w': jnp.zeros((2, 16, 128))}
  state, reference = optimizer.init(params), plain.init(params)
  assert state.inner.inner.mu['w'].dtype == jnp.uint8
  assert state.inner.inner.mu['w'].shape == (2, 8, 128)
  assert state.inner.scales.mu['w'].shape == (2, 8, 1)
  update, update_plain = jax.jit(optimizer.update), jax.jit(plain.update)
  for step in range(3):
    updates, state = update(normal(params, step), state)
    expected, reference = update_plain(normal(params, step), reference)
  difference = np.linalg.norm(updates['w'] - expected['w']) / np.linalg.norm(expected['w'])
  assert 0 < difference < 0.05


@pytest.mark.parametrize(('bits', 'gap'), [(8, 0.02), (4, 0.2)])
def test_descent_follows_f32_adam(bits, gap):
  """Least squares, 200 updates: the loss falls by four orders, and as Adam's does."""
  keys = jax.random.split(jax.random.key(0), 2)
  inputs, target = jax.random.normal(keys[0], (256, 64)), jax.random.normal(keys[1], (64, 64))
  loss = lambda w: jnp.mean(jnp.square(inputs @ (w - target)))

  def descend(inner):
    optimizer = optax.chain(inner, optax.scale_by_learning_rate(0.02))

    def step(carry, _):
      w, state = carry
      updates, state = optimizer.update(jax.grad(loss)(w), state)
      return (w + updates, state), loss(w)

    w = jnp.zeros((64, 64))
    return jax.lax.scan(step, (w, optimizer.init(w)), length=200)[1]

  plain, quantised = descend(optax.scale_by_adam()), descend(adam(bits, block_size=64))
  assert plain[-1] < 1e-2 * plain[0]
  assert np.any(plain != quantised)
  np.testing.assert_allclose(np.sqrt(quantised), np.sqrt(plain), atol=gap * np.sqrt(plain[0]))


def test_state_without_a_known_sign_is_refused():
  params = {'w': jnp.zeros((64, 64))}
  inner = optax.GradientTransformation(lambda p: {'slow': p}, lambda u, s, p=None: (u, s))
  with pytest.raises(ValueError, match=r"w: .*'slow' of shape \(64, 64\).*signs="):
    transforms.quantize_state(inner).init(params)
  kept = transforms.quantize_state(inner, signs={'slow': 'keep'}).init(params)
  assert kept.inner['slow']['w'].dtype == jnp.float32
  signed = transforms.quantize_state(inner, signs={'slow': 'signed'}).init(params)
  assert signed.inner['slow']['w'].dtype == jnp.uint8


def test_arguments_and_states_without_moments_are_refused():
  with pytest.raises(ValueError, match='block_size'):
    adam(block_size=33)
  with pytest.raises(ValueError, match='positive'):
    transforms.quantize_state(optax.scale_by_adam(), signs={'mu': 'positive'})
  galore = transforms.quantize_state(transforms.scale_by_galore(4))
  with pytest.raises(ValueError, match=r'w.*project\(quantize_state\(inner\), rank\)'):
    galore.init({'w': jnp.zeros((64, 128))})


@pytest.mark.parametrize(
  ('path', 'shape', 'quantised'),
  [('norm', (3, 2048), False), ('kernel', (3, 32, 64), False), ('kernel', (3, 64, 64), True)],
)
def test_a_layer_is_stored_as_the_stack_is(path, shape, quantised):
  """What counts against `min_size` is one matrix or vector: a step may see a layer at a time."""
  for layers in (shape[0], 1):
    params = {path: jnp.zeros((layers, *shape[1:]))}
    state = jax.eval_shape(transforms.quantize_state(optax.scale_by_adam()).init, params)
    assert (state.inner.mu[path].dtype == jnp.uint8) == quantised
