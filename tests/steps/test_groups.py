"""Steps in which parts of the parameters take turns, against optimizers run on them alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.steps import groups
from memjax.steps.rotations import badam, hift, lisa
from tests.steps.test_layerwise_transforms import Toy, batch_of, init_params

LAYERS = 3
ADAMW = functools.partial(optax.adamw, weight_decay=0.1)
RATE = optax.linear_schedule(0.02, 0.01, 20)

ROTATIONS = {
  'hift': lambda: hift(LAYERS, size=2),
  'hift top2down': lambda: hift(LAYERS, size=3, order='top2down'),
  'hift random': lambda: hift(LAYERS, order='random', key=jax.random.key(3)),
  'badam': lambda: badam(LAYERS, every=2),
  'badam ends': lambda: badam(LAYERS, size=2, every=2, order='random', ends=True),
  'lisa': lambda: lisa(LAYERS, size=1, every=2),
  'lisa keep': lambda: lisa(LAYERS, size=2, every=2, keep=True),
}


def units(params):
  """Parameters as a dict by unit, from the bottom; layers apart."""
  layer = lambda i: jax.tree.map(lambda x: x[i], params['blocks'])
  rest = {k: v for k, v in params.items() if k not in ('embed', 'blocks')}
  return [params['embed'], *(layer(i) for i in range(LAYERS)), rest]


def run(rotation, steps, **options):
  state = groups.init_state(init_params, ADAMW, rotation, jax.random.key(0))
  step = jax.jit(groups.make_train_step(Toy(), ADAMW, rotation, RATE, **options))
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


@pytest.mark.parametrize('name', ROTATIONS)
def test_units_train_as_alone_in_their_turn(name):
  rotation = ROTATIONS[name]()
  steps = 2 * 5
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
