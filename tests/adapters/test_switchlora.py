"""Exchanges of single vectors: how often, what stays what it was, who waits, what is forgotten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax import adapters, build, sharding, weights
from memjax.steps import whole_tree
from tests.adapters import training

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((2, 24, 20)), jnp.float32)
X = jnp.asarray(RNG.standard_normal((2, 6, 24)), jnp.float32)
KEY = jax.random.key(7)
OFTEN = dict(rank=8, alpha=8, interval=10, descent=1000)

# Updates -> interval, for 4,000 of descent and 40 at first.
INTERVALS = {0: 40.0120, 999: 54.0480, 3999: 133.3333, 7999: 444.4444, 19_999: 16460.9}
# (m, n) -> standard deviations of A and B at rank 256; m inputs, n outputs.
STDS = {
  (1024, 1024): (0.537285, 0.537285),
  (1024, 2736): (0.607515, 0.475174),
  (2736, 1024): (0.371662, 0.475174),
}


def loss(params, batch=None):
  out = jax.vmap(weights.dot)(X, params['w'])
  return jnp.sum((jnp.tanh(out) - 1) ** 2), jnp.float32(1)


def begin(transform, **fields):
  spec = adapters.SwitchLoRA(**OFTEN | fields)
  params = adapters.attach({'w': W}, spec, jax.random.key(1))
  return spec, whole_tree.init_state(lambda key: params, transform, jax.random.key(0))


def test_intervals_and_spreads_are_the_published_ones():
  spec = adapters.SwitchLoRA(rank=256)
  for step, interval in INTERVALS.items():
    assert float(spec.interval_at(step)) == pytest.approx(interval, rel=1e-4), step
  for shape, stds in STDS.items():
    for kind, std in enumerate(stds):
      assert spec._std(kind, *shape) == pytest.approx(std, abs=1e-6)
  drawn = spec._draw(jax.random.key(0), 0, jnp.arange(64), (1024, 1024), jnp.float32)
  assert 0.999 * 0.930605 < float(jnp.abs(drawn).max()) <= 0.930605
  assert float(drawn.std()) == pytest.approx(0.537285, rel=0.01)


@pytest.mark.parametrize('init', ['spread', 'lora'])
def test_the_beginning_is_the_same_function(init):
  _, state = begin(memjax.vector_adam(0.01), pool='device', init=init)
  leaf = state['params']['w']
  np.testing.assert_allclose(weights.materialize(leaf), W, rtol=0, atol=2e-6)
  # The last candidates, those of B rotated by half.
  assert leaf.chosen_a[0].tolist() == [12, 13, 14, 15, 16, 17, 18, 19]
  assert leaf.chosen_b[0].tolist() == [16, 17, 18, 19, 12, 13, 14, 15]
  for layer in range(2):
    np.testing.assert_array_equal(leaf.a[layer].T, leaf.pool_a[layer][leaf.chosen_a[layer]])
    np.testing.assert_array_equal(leaf.b[layer], leaf.pool_b[layer][leaf.chosen_b[layer]])
  assert bool(leaf.b.any()) == (init == 'spread')


@functools.cache
def history(pool, steps=60):
  """The leaf after each exchange; between two, training moves both factors."""
  transform = memjax.vector_adam(0.01)
  spec, state = begin(transform, pool=pool, freeze=2)

  def step(state, key):
    before = state['params']['w']
    state = spec.restart(state, KEY, transform.init)
    after = state['params']['w']
    noise = lambda x: x + 0.01 * jax.random.normal(key, x.shape)
    moved = weights.replaced(state['params'], jax.tree.map(noise, weights.trained(state['params'])))
    return {**state, 'params': moved, 'step': state['step'] + 1}, (before, after)

  return jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(3), steps)))(
    state
  )[1]


@pytest.mark.parametrize('pool', ['device', 'host', 'keys'])
def test_an_exchange_changes_no_value_and_no_candidate_is_there_twice(pool):
  before, after = history(pool)
  values = [
    leaf.base + leaf.scale * jnp.einsum('tlmr,tlrn->tlmn', leaf.a, leaf.b)
    for leaf in (before, after)
  ]
  np.testing.assert_allclose(*values, rtol=0, atol=1e-6 * float(jnp.abs(values[0]).max()))
  assert float(jnp.abs(after.base[-1] - after.base[0]).max()) > 0.1
  for chosen in (np.asarray(after.chosen_a), np.asarray(after.chosen_b)):
    assert (np.sort(chosen, -1)[..., 1:] > np.sort(chosen, -1)[..., :-1]).all()
    assert (chosen.max() < 20) == (pool != 'keys')
    moved = (chosen[1:] != chosen[:-1]).sum(-1)
    # 0.8 of 8 vectors at a time on average; 118 draws of a bit, at the first rate or a little less.
    assert abs(moved.mean() - 0.8 * 0.3**0.03) < 5 * 0.4 / np.sqrt(moved.size)


@pytest.mark.slow
def test_pools_in_the_hosts_memory_train_as_those_on_the_device():
  """To rounding, which depends on what the compiler fuses; Adam enlarges it."""

  def trained(pool):
    c = training.config(dict(name='switchlora', rank=4, interval=2, freeze=1, pool=pool))
    parts = build.build(c, sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2]))
    kernel = parts.state['params']['blocks']['attn']['o']['kernel']
    kinds = {x.sharding.memory_kind for x in (kernel.pool_a, kernel.pool_b)}
    assert kinds == ({'pinned_host'} if pool == 'host' else {'device'})
    assert kernel.a.sharding.memory_kind == 'device'
    state = parts.init(build.root_key(c, 'params'))
    return training.run(c, parts, parts.step, state, range(4))

  (there, losses), (here, others) = trained('host'), trained('device')
  np.testing.assert_allclose(losses, others, rtol=1e-6)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
  jax.tree.map(near, *(jax.device_get(state['params']) for state in (there, here)))


def test_what_is_due_together_waits_for_the_host_once():
  """A loop without a fixed number of trips is one that a GPU asks its host about."""
  transform = memjax.vector_adam(0.01)
  spec, state = begin(transform, pool='device')
  state['params'] = {name: state['params']['w'] for name in 'uvw'}
  state['opt'] = transform.init(weights.trained(state['params']))
  restart = lambda state: spec.restart(state, KEY, transform.init)
  loops = [eqn for eqn in jax.make_jaxpr(restart)(state).eqns if eqn.primitive.name == 'while']
  assert len(loops) == 1


def test_a_vector_that_leaves_takes_what_it_learnt_to_its_place():
  before, after = history('device')
  left = np.argwhere(np.asarray(before.chosen_a != after.chosen_a))
  assert len(left) > 50
  for t, layer, slot in left:
    place = before.chosen_a[t, layer, slot]
    np.testing.assert_array_equal(after.pool_a[t, layer, place], before.a[t, layer, :, slot])
    came = after.chosen_a[t, layer, slot]
    np.testing.assert_array_equal(after.a[t, layer, :, slot], before.pool_a[t, layer, came])
  # Once round the pool, vectors are no longer those that were drawn.
  first, last = before.pool_a[0], after.pool_a[-1]
  assert float(jnp.abs(first - last).max()) > 0.01


def test_counterparts_wait_just_as_long_as_said_and_forget():
  """Of a run: rows of B move in an update unless frozen, and a frozen one's state is zero."""
  transform = memjax.vector_adam(0.01)
  spec, state = begin(transform, freeze=5)
  restart = jax.jit(lambda state: spec.restart(state, KEY, transform.init))
  step = jax.jit(whole_tree.make_train_step(loss, transform))
  waits, since, seen = [], np.full((2, 8), 99), 0
  for _ in range(24):
    switched = restart(state)
    old, new = state['params']['w'], switched['params']['w']
    came = np.asarray(old.chosen_a != new.chosen_a)
    since = np.where(came, 0, since)
    frozen = np.asarray(new.frozen_b > 0)
    np.testing.assert_array_equal(frozen, since < 5)
    moments = switched['opt'][0]
    of_b = [moments.mu['w']['b'], moments.nu['w']['b'], moments.counts['w']['b']]
    assert not any(np.asarray(x)[frozen].any() for x in of_b)
    kept = np.asarray(state['opt'][0].mu['w']['a']).swapaxes(1, 2)[came & (new.frozen_a == 0)]
    passed_on = np.asarray(moments.mu['w']['a']).swapaxes(1, 2)[came & (new.frozen_a == 0)]
    np.testing.assert_array_equal(kept, passed_on)
    state, _ = step(switched, {'weights': jnp.ones(1)})
    moved = np.asarray(state['params']['w'].b != new.b).any(-1)
    np.testing.assert_array_equal(moved, ~frozen)
    since, seen = since + 1, seen + came.sum()
    waits.append(frozen.sum())
  assert seen > 20
  assert max(waits) > 2


@pytest.mark.parametrize(('hold', 'first'), [(True, 1.0), (False, 0.52212)])
def test_the_first_update_after_five_frozen_ones(hold, first):
  """A constant gradient; the official count goes on while a vector is frozen."""
  transform = memjax.vector_adam(1.0, hold=hold)
  params = {'w': {'b': jnp.zeros((2, 3))}}
  state, sizes = transform.init(params), []
  for step in range(31):
    gradient = jnp.ones((2, 3)) if step >= 5 else jnp.zeros((2, 3))
    updates, state = transform.update({'w': {'b': gradient}}, state, params)
    sizes.append(-float(updates['w']['b'][0, 0]))
  assert sizes[:5] == [0] * 5
  assert sizes[5] == pytest.approx(first, abs=1e-5)
  assert max(sizes) == pytest.approx(1.0 if hold else 1.06, abs=5e-3)


def test_a_rank_that_leaves_no_candidates_exchanges_none():
  transform = memjax.vector_adam(0.01)
  spec, state = begin(transform, rank=20)
  after = spec.restart(state, KEY, transform.init)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_state_that_has_no_vectors_is_refused():
  transform, spec = memjax.adamw8bit(0.01), adapters.SwitchLoRA(rank=64)
  init = lambda key: adapters.attach({'w': jnp.zeros((2, 80, 72))}, spec, key)

  def restarted(key):
    state = whole_tree.init_state(init, transform, key)
    return spec.restart(state, KEY, transform.init)

  with pytest.raises(ValueError, match=r'restart a vector of w/a alone .* vector_adam'):
    jax.eval_shape(restarted, KEY)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [(dict(pool='x'), "'x'"), (dict(init='x'), "'x'"), (dict(interval=9), 'interval is 9')],
)
def test_bad_fields_are_refused(fields, says):
  with pytest.raises(ValueError, match=says):
    adapters.SwitchLoRA(rank=2, **fields)


def config():
  fields = dict(rank=4, interval=2, freeze=1, descent=100, pool='device')
  return training.config(dict(name='switchlora', **fields))


@pytest.mark.slow
def test_a_run_resumed_midway_is_the_same():
  state = training.assert_resumes(config())
  leaf = state['params']['blocks']['attn']['o']['kernel']
  assert (leaf.chosen_a != np.arange(12, 16)).any()


@pytest.mark.slow
def test_a_run_layer_by_layer_over_a_mesh_is_the_same():
  whole, layered = training.assert_same_layer_by_layer_over_a_mesh(config())
  leaves = [state['params']['blocks']['attn']['o']['kernel'] for state in (whole, layered)]
  np.testing.assert_array_equal(leaves[0].chosen_a, leaves[1].chosen_a)


def test_devices_exchange_the_same_vectors():
  transform = memjax.vector_adam(0.01)
  spec = adapters.SwitchLoRA(rank=4, interval=2, freeze=1, pool='device')
  params = adapters.attach({'w': jnp.ones((2, 16, 16))}, spec, jax.random.key(1))
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  restart = lambda state: spec.restart(state, KEY, transform.init)
  after = training.assert_same_over_devices(restart, state)['params']['w']
  assert (after.chosen_a != params['w'].chosen_a).any()
