"""Steps in which parts of the parameters take turns, against optimizers run on them alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memjax import build, config, sharding
from memjax.steps import groups
from memjax.steps.rotations import badam, hift, lisa
from tests.steps.test_layerwise_transforms import RULES, Toy, batch_of, init_params

LAYERS = 3
ADAMW = functools.partial(optax.adamw, weight_decay=0.1)
RATE = optax.linear_schedule(0.02, 0.01, 20)

ROTATIONS = {
  'hift': lambda: hift(LAYERS, size=2),
  'hift random': lambda: hift(LAYERS, order='random', key=jax.random.key(3)),
  'badam ends': lambda: badam(LAYERS, size=2, every=2, order='random', ends=True),
  'lisa': lambda: lisa(LAYERS, size=1, every=2),
  'lisa keep': lambda: lisa(LAYERS, size=2, every=2, keep=True),
}


def units(params):
  """Parameters as a dict by unit, from the bottom; layers apart."""
  layer = lambda i: jax.tree.map(lambda x: x[i], params['blocks'])
  rest = {k: v for k, v in params.items() if k not in ('embed', 'blocks')}
  return [params['embed'], *(layer(i) for i in range(LAYERS)), rest]


def run(rotation, steps, shardings=None, **options):
  init = lambda key: groups.init_state(init_params, ADAMW, rotation, key)
  state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
  step = groups.make_train_step(Toy(), ADAMW, rotation, RATE, shardings=shardings, **options)
  step = jax.jit(step, out_shardings=shardings and (shardings, None))
  states = [state]
  for i in range(steps):
    state, metrics = step(state, batch_of(i))
    states.append(state)
  return states, metrics, step


def reference(rotation, steps):
  """AdamW on each unit alone, with gradients of the whole model and updates of the active units."""
  params, opts = init_params(None), {}
  mean = lambda params, batch: (lambda s: s[0] / s[1])(Toy().loss(params, batch))
  grad = jax.jit(jax.grad(mean))
  for i in range(steps):
    transform = ADAMW(float(RATE(i // rotation.cycle * rotation.cycle)))
    if not rotation.keep and i % rotation.every == 0:
      opts = {}
    grads, parts = units(grad(params, batch_of(i))), units(params)
    for unit in np.flatnonzero(rotation.active(i)):
      opt = opts.get(unit) or transform.init(parts[unit])
      updates, opts[unit] = transform.update(grads[unit], opt, parts[unit])
      parts[unit] = optax.apply_updates(parts[unit], updates)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts[1:-1])
    params = {'embed': parts[0], 'blocks': stacked, **parts[-1]}
  return params


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.slow) if n in ('hift random', 'lisa keep') else n
    for n in ROTATIONS
  ],
)
def test_units_train_as_alone_in_their_turn(name):
  rotation = ROTATIONS[name]()
  steps = 6  # More than a cycle.
  states, _, step = run(rotation, steps)
  assert step._cache_size() == 1
  for i, (before, after) in enumerate(itertools.pairwise(states)):
    changed = [
      not jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), *pair))
      for pair in zip(units(before['params']), units(after['params']))
    ]
    np.testing.assert_array_equal(changed, rotation.active(i))
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, states[-1]['params'], reference(rotation, steps))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['hift', 'badam ends', 'lisa'])
def test_units_train_as_alone_on_a_mesh(name):
  rotation = ROTATIONS[name]()
  mesh = sharding.make_mesh(data=2, fsdp=4)
  params = jax.eval_shape(init_params, None)
  where = sharding.param_shardings(params, RULES, mesh)
  init = lambda: groups.init_state(init_params, ADAMW, rotation, jax.random.key(0))
  opt = sharding.state_shardings(jax.eval_shape(init)['opt'], params, where)
  shardings = {'step': jax.NamedSharding(mesh, P()), 'params': where, 'opt': opt}
  states, _, step = run(rotation, 6, shardings)
  assert step._cache_size() == 1
  assert states[-1]['params']['blocks']['mlp']['kernel'].sharding.spec == P(None, 'fsdp')
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, states[-1]['params'], reference(rotation, 6))


class Half(Toy):
  """Parameters in bfloat16, arithmetic in f32."""

  def embed(self, params, tokens):
    return super().embed(widen(params), tokens)

  def block(self, layer, x):
    return super().block(widen(layer), x)

  def head_loss(self, params, x, targets, weights):
    return super().head_loss(widen(params), x, targets, weights)


def widen(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_badam_trains_an_f32_copy_of_its_block():
  """Updates under the last place of bfloat16 add up within a turn; the next block starts anew."""
  rotation = badam(LAYERS, every=8, order='bottom2up')
  halve = lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(key))
  state = groups.init_state(halve, ADAMW, rotation, jax.random.key(0))
  rate = lambda count: 5e-4
  step = jax.jit(groups.make_train_step(Half(), ADAMW, rotation, rate, rounding_key=None))
  mean = lambda params: (lambda s: s[0] / s[1])(Half().loss(params, batch_of(0)))
  grad = jax.jit(jax.grad(mean))
  params = halve(None)
  for turn in range(2):
    layer = lambda tree, turn=turn: jax.tree.map(lambda x: x[turn], tree['blocks'])
    transform, master = ADAMW(5e-4), widen(layer(params))
    opt = transform.init(master)
    for _ in range(8):
      updates, opt = transform.update(widen(layer(grad(params))), opt, master)
      master = optax.apply_updates(master, updates)
      put = lambda x, m, turn=turn: x.at[turn].set(m.astype(x.dtype))
      params = {**params, 'blocks': jax.tree.map(put, params['blocks'], master)}
      state, _ = step(state, batch_of(0))
  moved = np.asarray(
    state['params']['blocks']['mlp']['kernel'] != halve(None)['blocks']['mlp']['kernel']
  )
  assert moved[0].mean() > 0.3  # 8 updates of 0.0005: most numbers of size 1 need 8 to move.
  assert moved[1].mean() > 0.3
  assert not moved[2].any()
  # Gradients are rounded to bfloat16, and their f32 sums in another order may round otherwise.
  same = lambda x, y: np.mean(np.asarray(x == y)) > 0.99
  assert jax.tree.all(jax.tree.map(same, state['params'], params))
  near = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4)
  jax.tree.map(near, state['opt'].master['blocks'], jax.tree.map(lambda m: m[None], master))


def test_state_is_that_of_the_layers_whose_turn_it_is():
  init = lambda rotation: jax.eval_shape(
    lambda: groups.init_state(init_params, ADAMW, rotation, jax.random.key(0))
  )['opt']
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  params = jax.eval_shape(init_params, None)
  blocks, ends = size(params['blocks']), size((params['embed'], params['head']))
  count = lambda slots: 4 * (slots + 2)  # Adam's, of every unit that has a place.
  # The schedule that adamw is given has a count of its own.
  assert size(init(badam(LAYERS))) == 2 * blocks // LAYERS + 2 * count(1)
  assert size(init(badam(LAYERS, ends=True))) == 2 * (blocks // LAYERS + ends) + 2 * count(1)
  assert size(init(lisa(LAYERS, size=2))) == 2 * (2 * blocks // LAYERS + ends) + 2 * count(2)
  assert size(init(hift(LAYERS))) == 2 * (blocks + ends) + 2 * count(LAYERS)


class Counting(Toy):
  """Notes every layer that the backward pass goes through."""

  def __init__(self):
    self.visits = []

  def block(self, layer, x):
    @jax.custom_vjp
    def passed(x):
      return x

    def pull_back(_, cotangent):
      jax.debug.callback(lambda: self.visits.append(1))
      return (cotangent,)

    passed.defvjp(lambda x: (x, None), pull_back)
    return passed(super().block(layer, x))


def test_backward_pass_ends_at_the_lowest_unit_that_trains():
  model, rotation = Counting(), hift(LAYERS, order='top2down')
  state = groups.init_state(init_params, ADAMW, rotation, jax.random.key(0))
  step = jax.jit(groups.make_train_step(model, ADAMW, rotation, RATE))
  found = []
  for i in range(LAYERS + 2):
    state, _ = step(state, batch_of(i))
    jax.effects_barrier()
    found.append(len(model.visits))
    model.visits.clear()
  assert found == [0, 1, 2, 3, 3]  # Head, the layers from the top, embedding.


@pytest.mark.slow
def test_clipping_sees_what_trains_and_micro_batches_do_not_rotate():
  rotation = lisa(LAYERS, size=2)
  (_, plain), _, _ = run(rotation, 1, accumulate=2)
  (_, once), metrics, _ = run(rotation, 1)
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, plain['params'], once['params'])
  mean = lambda params: (lambda s: s[0] / s[1])(Toy().loss(params, batch_of(0)))
  grads = units(jax.grad(mean)(init_params(None)))
  mine = [grads[unit] for unit in np.flatnonzero(rotation.active(0))]
  np.testing.assert_allclose(metrics['train/grad_norm'], optax.global_norm(mine), rtol=1e-5)
  (_, clipped), _, _ = run(rotation, 1, clip_norm=0.5)
  mu = clipped['opt'][0].mu
  np.testing.assert_allclose(optax.global_norm(mu), 0.1 * 0.5, rtol=1e-5)


def test_rates_advance_once_a_cycle():
  rotation = hift(LAYERS, size=2)
  rate = rotation.learning_rate(lambda count: count)
  assert [rate(step) for step in range(7)] == [0, 0, 0, 3, 3, 3, 6]


def test_schedules_are_the_published_ones():
  def turns(rotation, steps):
    active = np.asarray(jax.jit(jax.vmap(rotation.active))(jnp.arange(steps)))
    return [np.flatnonzero(row).tolist() for row in active]

  assert turns(hift(3, size=2), 4) == [[0, 1], [2, 3], [4], [0, 1]]
  assert turns(hift(3, size=2, order='top2down'), 3) == [[3, 4], [1, 2], [0]]
  shuffled = turns(hift(3, order='random', key=jax.random.key(1)), 10)
  assert sorted(shuffled[:5]) == [[0], [1], [2], [3], [4]]
  assert shuffled[:5] == shuffled[5:]
  assert turns(badam(4, size=2, every=2), 5) == [[3, 4], [3, 4], [1, 2], [1, 2], [3, 4]]
  assert turns(badam(2, every=1, order='bottom2up', ends=True), 4) == [[0], [1], [2], [3]]
  rounds = turns(badam(3, every=1, order='random'), 30)
  rounds = [rounds[i : i + 3] for i in range(0, 30, 3)]
  assert all(sorted(r) == [[1], [2], [3]] for r in rounds)
  assert len({str(r) for r in rounds}) > 1
  drawn = turns(lisa(6, size=2, every=3), 300)
  assert all(len(d) == 4 and d[0] == 0 and d[-1] == 7 for d in drawn)
  assert all(drawn[i] == drawn[i - i % 3] for i in range(300))
  often = np.bincount(np.concatenate(drawn[::3]), minlength=8)[1:-1]
  # Of 100 draws each layer is in a third; four standard deviations are 19.
  assert np.all(np.abs(often - 100 / 3) < 19)


def config_of(step, **changes):
  c = config.default()
  c.model, c.step = 'llama_tiny', step
  c.update(changes)
  config.validate(c)
  return c


def test_a_config_reaches_what_a_method_leaves_open():
  rotation = build.build_rotation(config_of('lisa', groups=dict(keep=True)), 4)
  assert (rotation.keep, rotation.size) == (True, 2)
  rotation = build.build_rotation(config_of('badam', groups=dict(ends=True, every=1)), 4)
  assert rotation.ends
  assert rotation.active(0)[-1]


@pytest.mark.parametrize(
  ('step', 'fraction', 'expected'), [('hift', -1.0, 1.0), ('hift', 0.3, 0.3), ('hift', 0.0, 0.0)]
)
def test_waiting_state_is_where_the_config_says(step, fraction, expected):
  c = config_of(step, offload_state=fraction)
  state = build.build(c, sharding.make_mesh(devices=jax.devices()[:1])).state['opt']
  size = lambda leaves: sum(x.size for x in leaves)
  leaves = jax.tree.leaves(state)
  on_host = size(x for x in leaves if x.sharding.memory_kind == 'pinned_host')
  assert expected - 0.15 <= on_host / size(leaves) <= expected


def test_a_run_within_a_cycle_whose_rate_is_zero_is_refused():
  c = config_of('hift', steps=24)
  with pytest.raises(
    ValueError, match=r'nothing would train; set config\.schedule\.warmup_ratio=0'
  ):
    build.build_rotation(c, 22)
  assert build.build_rotation(c, 21).cycle == 23
  c.schedule.warmup_ratio = 0.0
  assert build.build_rotation(c, 22).cycle == 24


@pytest.mark.parametrize(
  ('make', 'sentence'),
  [
    (lambda: hift(3, order='sideways'), "order 'sideways' does not exist"),
    (lambda: hift(3, size=6), 'at most 5'),
    (lambda: badam(3, every=0), '0 updates'),
    (lambda: lisa(3, size=4), '4 layers'),
  ],
)
def test_turns_that_do_not_exist(make, sentence):
  with pytest.raises(ValueError, match=sentence):
    make()
