"""Restarts: the merge, what is drawn and forgotten then, and the same as an optax transform."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import adapters, compat, weights
from memjax.adapters import over_time
from memjax.steps import whole_tree
from tests.adapters import training

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((2, 12, 10)), jnp.float32)
X = jnp.asarray(RNG.standard_normal((2, 6, 12)), jnp.float32)
ADAM = optax.adam(0.01)
KEY = jax.random.key(7)
SPEC = adapters.ReLoRA(rank=3, alpha=6, every=2)


def loss(params, batch=None):
  out = jax.vmap(weights.dot)(X, params['w'])
  return jnp.sum((jnp.tanh(out) - 1) ** 2), jnp.float32(1)


@functools.cache
def trained(steps=2, transform=ADAM):
  """State after steps without a restart."""
  params = adapters.attach({'w': W}, SPEC, jax.random.key(1))
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  step = jax.jit(whole_tree.make_train_step(loss, transform))
  for _ in range(steps):
    state, _ = step(state, {'weights': jnp.ones(1)})
  return state


def restarted(init=ADAM.init, state=None, **fields):
  spec = adapters.ReLoRA(**dict(rank=3, alpha=6, every=2) | fields)
  return jax.jit(lambda state: spec.restart(state, KEY, init))(state or trained())


def moments(state):
  return state['opt'][0].mu['w'], state['opt'][0].nu['w']


def test_a_restart_merges_draws_anew_and_changes_no_value():
  before, after = trained()['params']['w'], restarted()['params']['w']
  # Twice the product: alpha / r.
  merged = before.base + 2 * jnp.einsum('lmr,lrn->lmn', before.a, before.b)
  np.testing.assert_allclose(after.base, merged, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(weights.materialize(after), merged, rtol=1e-6, atol=1e-6)
  assert float(jnp.abs(after.base - before.base).max()) > 0.01
  assert not after.b.any()
  assert 0 < float(jnp.abs(after.a).max()) <= 1 / np.sqrt(12)
  assert not np.isin(after.a, before.a).any()
  assert not np.isin(after.a[0], after.a[1]).any()


def test_magnitude_pruning_keeps_the_same_largest_of_both_moments():
  draw = lambda x: jnp.asarray(RNG.standard_normal(x.shape), x.dtype) if x.ndim else x
  before = trained() | {'opt': jax.tree.map(draw, trained()['opt'])}
  (mu, nu), (kept_mu, kept_nu) = moments(before), moments(restarted(state=before, ratio=0.75))
  for factor in 'ab':
    for layer in range(2):
      old, new = np.asarray(mu[factor][layer]), np.asarray(kept_mu[factor][layer])
      largest = np.abs(old) > np.quantile(np.abs(old), 0.75)
      assert 0 < largest.sum() < largest.size / 3
      np.testing.assert_array_equal(new, np.where(largest, old, 0))
      second = np.where(largest, nu[factor][layer], 0)
      np.testing.assert_array_equal(kept_nu[factor][layer], second)


@pytest.mark.parametrize('apart', [False, True])
def test_random_pruning_keeps_its_share_of_both_moments_together_or_apart(apart):
  ones = jnp.ones((4, 64, 32))
  spec = adapters.ReLoRA(rank=2, every=2, prune='random', ratio=0.9, apart=apart)
  thinned = spec._pruned(jax.random.key(3), {'mu': ones, 'nu': ones})
  mu, nu = (np.asarray(thinned[name], bool) for name in ('mu', 'nu'))
  share = np.sqrt(0.9 * 0.1 / ones.size)
  assert abs(mu.mean() - 0.1) < 5 * share
  assert (mu == nu).all() != apart
  if apart:  # The official code: hardly a number keeps both.
    assert abs((mu & nu).mean() - 0.01) < 5 * share


def test_zero_starts_moments_and_counts_of_vectors_anew():
  transform = memjax.vector_adam(0.01)
  after = restarted(transform.init, trained(2, transform), prune='zero')['opt'][0]
  assert not any(x.any() for x in jax.tree.leaves([after.mu, after.nu, after.counts]))


def test_what_is_kept_in_codes_is_reset_but_not_pruned_number_by_number():
  transform = memjax.adamw8bit(0.01)

  def after(key, prune):
    spec = adapters.ReLoRA(rank=64, every=2, prune=prune)
    init = lambda key: adapters.attach({'w': jnp.zeros((64, 64))}, spec, key)
    state = whole_tree.init_state(init, transform, key)
    filled = {'opt': jax.tree.map(lambda x: jnp.full_like(x, 7), state['opt']), 'step': 2}
    return spec.restart(state | filled, key, transform.init)['opt']

  with pytest.raises(ValueError, match=r"no moments of w/a in its shape .* set prune='zero'"):
    jax.eval_shape(functools.partial(after, prune='magnitude'), KEY)
  # Zero moments are not codes of zeros.
  new = transform.init({'w': {'a': jnp.zeros((64, 64)), 'b': jnp.zeros((64, 64))}})
  found = jax.jit(functools.partial(after, prune='zero'))(KEY)
  same = jax.tree.map(lambda x, y: bool((x == y).all()), found, new)
  shared = [k for k, v in jax.tree.leaves_with_path(same) if not v]
  assert shared
  assert all('count' in jax.tree_util.keystr(path) for path in shared)


@pytest.mark.parametrize(('offset', 'steps'), [(0, [3, 6]), (1, [4, 7])])
def test_when_it_is_due(offset, steps):
  spec = adapters.ReLoRA(rank=2, every=3, offset=offset)
  assert [t for t in range(8) if spec.due(t)] == steps


def test_the_transform_is_the_run():
  """Five updates with two restarts, by `optax.apply_updates`, then a third restart of the run."""
  optimizer = optax.adam(0.01, eps=1e-2)
  run = jax.jit(
    over_time(whole_tree.make_train_step(loss, optimizer), SPEC, jax.random.key(5), optimizer.init)
  )
  params = adapters.attach({'w': W}, SPEC, jax.random.key(1))
  state = whole_tree.init_state(lambda key: params, optimizer, jax.random.key(0))
  # A run's restarts have a key of their own.
  key = memjax.naming.fold_in_path(jax.random.key(5), 'restart')
  transform = adapters.relora(optimizer, SPEC, key)
  inner = transform.init(params)
  update = jax.jit(transform.update)
  for _ in range(5):
    state, _ = run(state, {'weights': jnp.ones(1)})
    updates, inner = update(jax.grad(lambda p: loss(p)[0])(params), inner, params)
    params = optax.apply_updates(params, updates)
  assert float(jnp.abs(params['w'].base - W).max()) > 0.02
  near = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-6)
  jax.tree.map(near, params, state['params'])
  with pytest.raises(ValueError, match='the parameters'):
    transform.update(params, inner)


def test_the_transform_moves_the_masks_of_the_dropout():
  spec = adapters.ReLoRA(rank=3, every=9, dropout=0.5)
  params = adapters.attach({'w': W}, spec, jax.random.key(1))
  transform = adapters.relora(ADAM, spec, KEY)

  @jax.jit
  def update(params, state):
    of = lambda values: loss(weights.replaced(params, values))[0]
    updates, state = transform.update(jax.grad(of)(weights.trained(params)), state, params)
    return optax.apply_updates(params, updates), state

  one, state = update(params, transform.init(params))
  two, _ = update(one, state)
  keys = [params['w'].key, one['w'].key, two['w'].key]
  assert all((x != y).all() for x, y in itertools.pairwise(keys))


def test_the_official_arguments_and_their_quirks():
  spec = compat.relora(8, 32, 0.0, relora=10)
  assert (spec.scale, spec.prune, spec.ratio) == (4, 'random', 0.999)
  assert (spec.apart, spec.offset) == (True, 1)
  leaf = spec.adapt(W[0], jax.random.key(0))
  assert not leaf.a.any()
  assert not leaf.b.any()
  with pytest.raises(ValueError, match='choose one of'):
    compat.relora(relora=10, optimizer_random_pruning=0.5)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [(dict(prune='x'), "'x'"), (dict(ratio=2), 'ratio'), (dict(offset=2), 'offset')],
)
def test_bad_fields_are_refused(fields, says):
  with pytest.raises(ValueError, match=says):
    adapters.ReLoRA(rank=2, every=2, **fields)


def config():
  return training.config(dict(name='relora', rank=4, every=2, dropout=0.1), optimizer='adamw')


@pytest.mark.slow
def test_a_run_resumed_midway_is_the_same():
  training.assert_resumes(config())


@pytest.mark.slow
def test_a_run_layer_by_layer_over_a_mesh_is_the_same():
  training.assert_same_layer_by_layer_over_a_mesh(config())


def test_devices_draw_and_prune_the_same():
  transform, params = ADAM, {'w': jnp.ones((2, 16, 16))}
  spec = adapters.ReLoRA(rank=4, every=2, ratio=0.5)
  params = adapters.attach(params, spec, jax.random.key(1))
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0)) | {'step': 2}
  draw = lambda x: jnp.asarray(RNG.standard_normal(x.shape), x.dtype) if x.ndim else x
  state['opt'] = jax.tree.map(draw, state['opt'])
  training.assert_same_over_devices(lambda state: spec.restart(state, KEY, transform.init), state)
