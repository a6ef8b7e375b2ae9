"""LoRA's kin: each leaf is the matrix of its formula, has its derivatives, and trains in every
step, over weights in 4 bits too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters, build, compat, sharding, transforms, weights
from memjax.estimators.noise import family
from memjax.models import create
from memjax.weights.dora import column_lengths
from tests.adapters import training

M, N, RANK = 64, 32, 4
KINDS = {
  'lora': adapters.LoRA(rank=RANK, alpha=6),
  'dora': adapters.DoRA(rank=RANK, alpha=6),
  'melora': adapters.MELoRA(rank=RANK, alpha=6, blocks=4),
  'sora': adapters.SoRA(rank=RANK, alpha=6),
  'flat_lora': adapters.FlatLoRA(rank=RANK, alpha=6, rho=2.0, steps=10),
  'pc_lora': adapters.PCLoRA(rank=RANK, alpha=6, fade_steps=10),
}
SCALE = 6 / RANK


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def made(kind, matrix, seed=0):
  """An adapted leaf `[M, N]` in the midst of training: no part is zero, noise is on."""
  spec = KINDS[kind]
  leaf = jax.jit(lambda w: adapters.attach({'w': w}, spec, jax.random.key(seed))['w'])(matrix)
  moved = lambda path, x: x + 0.3 * draw(*x.shape, seed=seed + len(str(path)))
  trained = jax.tree.map_with_path(moved, weights.trained({'w': leaf}))
  state = {'step': jnp.int32(4), 'params': weights.replaced({'w': leaf}, trained)}
  if hasattr(spec, 'advance'):
    state = jax.jit(spec.advance)(state, jax.random.key(7))
  return state['params']['w']


def formula(kind, leaf, part):
  """The matrix, of W as a dense array and a dict of what is trained, in plain jnp."""
  w = jax.lax.stop_gradient(weights.materialize(leaf.base))
  inner = part if kind == 'lora' else part['adapted']
  a, b = inner['a'], inner['b']
  if kind == 'dora':
    v = w + SCALE * a @ b
    return v * (part['magnitude'] / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0)))[None, :]
  if kind == 'melora':
    blocks = [a_j @ b_j for a_j, b_j in zip(jnp.split(a, 4, axis=0), jnp.split(b, 4, axis=1))]
    return w + SCALE * jax.scipy.linalg.block_diag(*blocks)
  if kind == 'sora':
    return w + SCALE * (a * part['gate'][None, :]) @ b
  if kind == 'flat_lora':
    # After 4 of 10 steps; Threefry's numbers, column by column of the sum's length.
    strength = 2.0 * 0.5 * (1 - np.cos(np.pi * 0.4))
    v = w + SCALE * a @ b
    lengths = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
    return v + strength / np.sqrt(M) * lengths[None, :] * leaf.noise.draw(leaf.key, (M, N))
  return (0.6 if kind == 'pc_lora' else 1) * w + SCALE * a @ b


@functools.cache
def matrix(stored):
  store = {'dense': lambda x: x, 'nf4': weights.quantise_nf4}[stored]
  return jax.jit(store)(draw(M, N, seed=1))


def close(x, y, tolerance=2e-5):
  """f32 sums of 64 terms of order 1 in another order."""
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
  ('kind', 'stored'),
  [
    *((kind, 'dense') for kind in KINDS),
    *((kind, 'nf4') for kind in ('dora', 'flat_lora', 'pc_lora')),
  ],
)
def test_products_and_derivatives_are_those_of_the_formula(kind, stored):
  leaf, x, y = made(kind, matrix(stored)), 0.1 * draw(3, 5, M, seed=2), draw(7, N, seed=3)
  trained = weights.trained(leaf)

  @jax.jit
  def ours(trained, x):
    w = weights.replaced(leaf, trained)
    return jnp.sum(weights.dot(x, w) ** 2), (weights.dot(y, w, True), weights.materialize(w))

  @jax.jit
  def plain(trained, x):
    w = formula(kind, leaf, trained)
    return jnp.sum((x @ w) ** 2), (y @ w.T, w)

  differentiate = lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(trained, x)
  got, expected = differentiate(ours), differentiate(plain)
  jax.tree.map(close, got, expected)
  assert min(np.abs(g).max() for g in jax.tree.leaves(expected[1])) > 1e-2


@pytest.mark.parametrize('kind', KINDS)
def test_a_merge_is_the_formula_without_noise(kind):
  leaf = made(kind, matrix('dense'))
  rest = leaf.with_key(None)
  merged = jax.jit(adapters.merge)({'w': leaf})['w']
  close(merged, jax.jit(weights.materialize)(rest))
  if kind != 'flat_lora':
    close(merged, formula(kind, leaf, weights.trained(leaf)))
  np.testing.assert_array_equal(adapters.detach({'w': leaf})['w'], matrix('dense'))
  ids = jnp.array([3, 0, 3])
  close(jax.jit(weights.take)(rest, ids), np.asarray(merged)[ids])


@pytest.mark.parametrize('kind', KINDS)
def test_training_begins_at_the_matrix(kind):
  init = lambda w: adapters.attach({'w': w}, KINDS[kind], jax.random.key(0))
  leaf = jax.jit(init)(jnp.stack([matrix('dense')] * 2))['w']
  close(jax.jit(weights.materialize)(leaf.with_key(None)), np.stack([matrix('dense')] * 2), 1e-6)
  shapes = jax.tree.map(jnp.shape, weights.trained(leaf))
  inner = shapes if kind == 'lora' else shapes['adapted']
  assert inner == {'a': (2, M, RANK), 'b': (2, RANK, N)}


def test_a_stack_merges_in_place():
  for kind in ('dora', 'pc_lora'):
    one = made(kind, matrix('dense'))
    stack = jax.tree.map(lambda x: jnp.stack([x] * 4), one)
    fold = jax.jit(lambda leaf: adapters.fold(leaf), donate_argnums=0)
    memory = fold.lower(stack).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * 4 * M * N
    # Of one matrix: in f32 as it was, the addition, and their sum.
    assert memory.temp_size_in_bytes < 4.5 * 4 * M * N
    close(fold(stack), np.stack([jax.jit(weights.materialize)(one)] * 4))


def test_lengths_of_columns_are_had_without_the_sum():
  leaf = made('dora', matrix('nf4'))
  dense = np.asarray(weights.materialize(leaf.base) + leaf.adapted.delta())
  lengths = jax.jit(column_lengths)
  close(lengths(leaf.adapted, leaf.square), np.linalg.norm(dense, axis=0), 1e-6)
  wide = jax.eval_shape(
    lambda w: adapters.attach({'w': w}, KINDS['dora'], jax.random.key(0))['w'],
    jax.ShapeDtypeStruct((512, 512), jnp.float32),
  )
  memory = lengths.lower(wide.adapted, wide.square).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 512 * 512 / 4  # A few arrays [r, n].


def test_a_column_of_zeros_stays_finite():
  leaf = made('dora', matrix('dense').at[:, 0].set(0))
  leaf = dataclasses.replace(leaf, adapted=dataclasses.replace(leaf.adapted, b=0 * leaf.adapted.b))
  assert np.isfinite(jax.jit(weights.dot)(jnp.ones((1, M)), leaf)).all()


def test_noise_has_its_law_and_grows_with_the_steps():
  spec = dataclasses.replace(KINDS['flat_lora'], rho=0.05, steps=1000)
  found = [round(float(spec.strength(t)) / 0.05, 6) for t in (0, 250, 500, 1000, 2000)]
  assert found == [0.0, 0.146447, 0.5, 1.0, 1.0]  # (1 - cos(pi t / T)) / 2.
  leaf = made('flat_lora', draw(4096, 8, seed=4))
  clean = jax.jit(weights.materialize)(leaf.with_key(None))
  noise = np.asarray(jax.jit(weights.materialize)(leaf) - clean)
  # Standard deviation: strength |w| / sqrt(m), so that the noise is `strength` of a column long.
  share = np.linalg.norm(noise, axis=0) / np.linalg.norm(clean, axis=0)
  np.testing.assert_allclose(share, float(leaf.strength), rtol=0.05)


def test_gates_close_by_the_proximal_step_and_the_official_one():
  """Golden values, threshold 0.1; 0.2 is at the official boundary and is left out."""
  gates = jnp.array([0.05, 0.1, 0.15, 0.25, -0.15, -0.3])
  zero = jnp.zeros_like(gates)
  proper = transforms.soft_threshold(lambda count: 0.5 + 0 * count, 0.2)
  official = compat.sora_threshold(0.1)
  step = lambda t: gates + t.update(zero, t.init(gates), gates)[0]
  np.testing.assert_allclose(step(proper), [0, 0, 0.05, 0.15, -0.05, -0.2], atol=1e-7)
  np.testing.assert_allclose(step(official), [0, 0.1, 0, 0.15, 0, -0.2], atol=1e-7)


def test_b_learns_at_its_own_rate():
  params = {'w': made('dora', matrix('dense')), 'bias': jnp.ones(3)}
  plain = {'dense': {'w': jnp.ones((3, 3)), 'b': jnp.ones(3)}}
  assert set(adapters.labels(plain)['dense'].values()) == {'rest'}  # A bias by its short name.
  trained = weights.trained(params)
  assert adapters.labels(trained) == {
    'w': {'adapted': {'a': 'a', 'b': 'b'}, 'magnitude': 'magnitude'},
    'bias': 'rest',
  }
  spec = dataclasses.replace(KINDS['dora'], rate_ratio=16.0)
  scaled = spec.optimizer(optax.adam(0.01), 0.01)
  plus = adapters.lora_plus(optax.adam, optax.constant_schedule(0.01))
  plain = optax.adam(0.01)
  updates = [t.update(trained, t.init(trained), trained)[0] for t in (scaled, plus, plain)]
  jax.tree.map(functools.partial(close, tolerance=1e-6), updates[0], updates[1])
  ratios = jax.tree.map(lambda x, y: float(jnp.mean(x / y)), updates[0], updates[2])
  assert ratios['w']['adapted'] == pytest.approx({'a': 1.0, 'b': 16.0})
  assert (ratios['w']['magnitude'], ratios['bias']) == pytest.approx((1.0, 1.0))


def test_biases_are_trained_on_request():
  params = {'q': {'kernel': matrix('dense'), 'bias': jnp.zeros(N)}, 'norm': {'bias': jnp.ones(M)}}
  spec = adapters.LoRA(rank=2, targets='q/kernel', rest='bias')
  trained = adapters.trainable(adapters.attach(params, spec, jax.random.key(0)))
  assert trained['q']['bias'] is not None
  assert trained['norm']['bias'] is not None


@pytest.mark.parametrize('kind', ['dora', 'sora'])
def test_factors_may_be_noisy_ones(kind):
  """As a zeroth-order step sees them: what is trained is perturbed where it is used."""
  leaf, x = made(kind, matrix('nf4')), draw(3, M, seed=2)
  gaussian = family('gaussian')

  @jax.jit
  def both():
    key = jnp.arange(2, dtype=jnp.uint32)
    perturb = lambda value: weights.Perturbed(value, key, jnp.float32(0.1), gaussian)
    noisy = jax.tree.map(perturb, weights.trained(leaf))
    dense = jax.tree.map(weights.materialize, noisy, is_leaf=weights.is_weight)
    return weights.replaced(leaf, noisy).dot(x), x @ formula(kind, leaf, dense)

  close(*both())
  assert np.abs(both()[0] - leaf.dot(x)).max() > 0.1


STEPPED = {
  'dora': {},
  'flat_lora': dict(steps=5),
  'melora': dict(blocks=2),
  'pc_lora': dict(fade_steps=50, task_share=1.0),
  'sora': {},
}


def config(name, optimizer='adamw', **changes):
  adapter = dict(name=name, rank=4, **STEPPED[name])
  return training.config(adapter, optimizer=optimizer, weights='nf4', **changes)


@pytest.mark.slow
@pytest.mark.parametrize('name', STEPPED)
def test_a_run_over_4_bits_resumed_midway_or_layer_by_layer_over_a_mesh_is_the_same(name):
  training.assert_resumes(config(name))
  training.assert_same_layer_by_layer_over_a_mesh(config(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', STEPPED)
def test_values_of_the_loss_train_it_too(name):
  c = config(name, optimizer='mezo', learning_rate=1e-3, step='zeroth_order')
  parts = build.build(c, sharding.make_mesh(devices=jax.devices()[:1]))
  state = parts.init(build.root_key(c, 'params'))
  before = jax.device_get(weights.trained(state['params']))
  state, losses = training.run(c, parts, parts.step, state, range(3))
  assert np.isfinite(losses).all()
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, weights.trained(state['params']))
  assert min(jax.tree.leaves(moved)) > 0


MODEL = create('llama_tiny', vocab=32, hidden=16, intermediate=32, heads=2, kv_heads=2, layers=2)


@functools.cache
def fading(step):
  """A model in training whose weights fade over 4 updates, before the update `step`."""
  spec = adapters.PCLoRA(rank=2, fade_steps=4)

  @jax.jit
  def state():
    params = adapters.attach(MODEL.init(jax.random.key(0)), spec, jax.random.key(1))
    moved = jax.tree.map(lambda x: x + 0.1, weights.trained(params))
    state = {'step': jnp.int32(step), 'params': weights.replaced(params, moved)}
    return spec.advance(state, jax.random.key(2))

  return state()['params']


@pytest.mark.slow
def test_weights_that_faded_are_exported_as_products():
  with pytest.raises(ValueError, match=r'^blocks/attn/k/kernel: 0.25 of the weight is left'):
    adapters.compressed(fading(3))
  with pytest.raises(ValueError, match='no leaf is one that fades'):
    adapters.compressed({'w': jnp.ones((2, 2))})
  params = fading(4)
  small = adapters.compressed(params)
  kernel = small['blocks']['mlp']['up']['kernel']
  assert isinstance(kernel, weights.Product)
  matrices = lambda tree: sum(x.size for x in jax.tree.leaves(tree['blocks']) if x.ndim == 3)
  assert matrices(small) < matrices(params) / 2
  dense = jax.jit(weights.materialize)
  close(dense(kernel), dense(params['blocks']['mlp']['up']['kernel']), 1e-6)
  x = draw(3, 16)
  one = jax.tree.map(lambda leaf: leaf[0], kernel)
  close(one.dot(x), x @ one.materialize())
  close(one.dot(x @ one.materialize(), True), x @ one.materialize() @ one.materialize().T)


def test_a_compressed_model_is_written_and_read_as_products(tmp_path):
  small = adapters.compressed(fading(4))
  adapters.save_products(tmp_path / 'model.safetensors', small)
  size = sum(x.nbytes for x in jax.tree.leaves(small))
  assert size < (tmp_path / 'model.safetensors').stat().st_size < size + 10_000
  again = adapters.load_products(tmp_path / 'model.safetensors')
  assert jax.tree.structure(again) == jax.tree.structure(small)
  jax.tree.map(np.testing.assert_array_equal, again, small)
  merged = adapters.merge(small)
  assert not any(map(weights.is_weight, jax.tree.leaves(merged, is_leaf=weights.is_weight)))
  up = small['blocks']['mlp']['up']['kernel']
  close(merged['blocks']['mlp']['up']['kernel'], weights.materialize(up), 1e-6)
  with pytest.raises(ValueError, match=r'^blocks/attn/k/kernel is a Fading, .*compressed'):
    adapters.save_products(tmp_path / 'model.safetensors', fading(4))
  with pytest.raises(ValueError, match='there is no file'):
    adapters.load_products(tmp_path / 'other.safetensors')


@pytest.mark.slow
def test_hidden_states_are_compared_with_the_original():
  params = fading(2)
  batch = {k: jnp.arange(16).reshape(2, 8) for k in ('tokens', 'targets')}
  batch['weights'] = jnp.ones((2, 8)).at[0, 0].set(0)
  task, _ = jax.jit(MODEL.loss)(params, batch)
  got, count = jax.jit(adapters.distilled(MODEL, 0.25))(params, batch)

  @jax.jit
  def apart(params):
    """In plain jnp, of the halved matrices and of the drawn ones."""
    ours = jax.tree.map(weights.materialize, params, is_leaf=weights.is_weight)
    theirs = adapters.detach(params)
    x, y, total = ours['embed']['embedding'][batch['tokens']], None, 0.0
    y = theirs['embed']['embedding'][batch['tokens']]
    for i in range(2):
      layers = [jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks']) for p in (ours, theirs)]
      x, y = MODEL.block(layers[0], x), MODEL.block(layers[1], y)
      total += jnp.sum(batch['weights'] * jnp.mean((x - y) ** 2, axis=-1)) / 2
    return total

  expected = 0.25 * task + 0.75 * apart(params)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert float(apart(params)) > 0.01
  assert count == 15


@pytest.mark.parametrize(
  ('spec', 'error'),
  [
    (adapters.MELoRA(rank=2, blocks=5), r'^w: the sides of \(64, 32\) are not multiples of block'),
    (adapters.MELoRA(rank=9, blocks=4), r'^w: rank 9 is above 8, .* one of 4 blocks'),
  ],
)
def test_blocks_that_do_not_fit_are_refused_by_leaf(spec, error):
  with pytest.raises(ValueError, match=error):
    adapters.attach({'w': matrix('dense')}, spec, jax.random.key(0))


@pytest.mark.parametrize(
  ('kind', 'arguments', 'error'),
  [
    ('FlatLoRA', dict(rho=0.0), 'rho 0.0'),
    ('SoRA', dict(penalty=-1.0), 'reward large gates'),
    ('PCLoRA', dict(fade='linea'), "the nearest is 'linear'"),
    ('PCLoRA', dict(task_share=2.0), 'not a fraction'),
    ('LoRA', dict(rate_ratio=0.0), 'rate_ratio is 0.0'),
  ],
)
def test_arguments_out_of_range_are_refused(kind, arguments, error):
  with pytest.raises(ValueError, match=error):
    getattr(adapters, kind)(rank=2, **arguments)


def test_layer_by_layer_does_not_distil():
  c = config('pc_lora', step='layerwise', remat='full')
  c.adapter.task_share = 0.5
  with pytest.raises(ValueError, match=r"pc_lora.*config\.step='layerwise' never has"):
    build.build(c, sharding.make_mesh(devices=jax.devices()[:1]))
