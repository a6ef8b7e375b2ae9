"""What GaLore costs beside AdamW, and a refresh beside the one of optax.

Prints ratios of times, measured in turns in one process, as other work on the machine slows both:

- `step`: a whole training step (forward, backward, update) of the 60M LLaMA with GaLore, with its
  share of refreshes, over the same step with `optax.adamw`. Aim: at most 1.10.
- `update`: the optimizer alone, for information.
- `refresh`: new bases for one layer's seven matrices by `subspace_iteration`, over those of
  `optax.contrib.galore`, an SVD each. Aim: at most 0.15.

    python benchmarks/galore_step.py            # minutes on two cores
"""

import os
import statistics
import time

# The threads of LAPACK, waiting busily between factorisations, would slow XLA's. Both sides gain.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import memjax
from memjax.models import create
from memjax.steps.whole_tree import make_train_step

RANK, EVERY = 128, 200

_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Measurements of each program; medians count.')
_BATCH = flags.DEFINE_integer('batch', 2, 'Sequences of 256 tokens a step; more favour GaLore.')


def _seconds(run):
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def _medians(*runs, more=1):
  """Median seconds of each function, run in turns after one warm-up."""
  for run in runs:
    run()
  times = [[_seconds(run) for run in runs] for _ in range(more * _ROUNDS.value)]
  return [statistics.median(column) for column in zip(*times)]


class _Program:
  """A compiled step that owns its donated state; calling it advances the state."""

  def __init__(self, step, state, *args):
    self._state = state
    self._step = jax.jit(step, donate_argnums=0)
    self._args = args

  def __call__(self):
    self._state = self._step(self._state, *self._args)
    return self._state


def _at(count, state):
  """The same state after `count` updates, as far as its counts tell.

  The count is an argument of every program: one that knew it would compute at compile time what
  training computes in every step.
  """
  is_count = lambda path: getattr(path[-1], 'name', '') == 'count'
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.broadcast_to(count, x.shape) if is_count(path) else x, state
  )


def _optimizer_step(optimizer):
  """An update that sees the count it is given."""

  def step(state, gradient, count):
    params, inner = state
    updates, inner = optimizer.update(gradient, _at(count, inner), params)
    return optax.apply_updates(params, updates), inner

  return step


def _random_like(abstract):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), abstract)


def _updates(model):
  """Seconds of AdamW's update, of GaLore's, and of refreshing all bases once."""
  gradient = _random_like(model.abstract())
  adamw = optax.adamw(1e-3)
  galore = memjax.galore(1e-3, RANK, refresh_every=EVERY, stagger=False)

  def program(optimizer, count):
    params = jax.tree.map(jnp.array, gradient)
    state = jax.jit(optimizer.init)(params)
    # One update first: a basis is then warm, as all but the first refresh find it.
    _, state = jax.jit(optimizer.update)(gradient, state, params)
    return _Program(_optimizer_step(optimizer), (params, state), gradient, jnp.int32(count))

  adam, ordinary, all_refreshed = _medians(
    program(adamw, 1), program(galore, 1), program(galore, EVERY)
  )
  return adam, ordinary, all_refreshed - ordinary


def _steps(model):
  """Seconds of a training step with AdamW and with GaLore, in an update that refreshes nothing."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.vocab, (_BATCH.value, 257))
  batch = {
    'tokens': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': jnp.ones((_BATCH.value, 256)),
  }

  def program(optimizer):
    train_step = make_train_step(model.loss, optimizer)
    params = jax.jit(model.init)(jax.random.key(0))

    def step(state, batch, count):
      state, _ = train_step({**state, 'opt': _at(count, state['opt'])}, batch)
      return state

    state = {'step': jnp.zeros([], jnp.int32), 'params': params, 'opt': optimizer.init(params)}
    return _Program(step, state, batch, jnp.int32(1))

  galore = memjax.galore(1e-3, RANK, refresh_every=EVERY, stagger=False)
  return _medians(program(optax.adamw(1e-3)), program(galore))


def _refreshes(model):
  """Seconds of refreshing one layer's bases with memjax and with optax."""
  # Of one layer only, since optax projects no stacked leaves.
  stacked = [x for x in jax.tree.leaves(model.abstract()['blocks']) if x.ndim == 3]
  blocks = _random_like([jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in stacked])

  def program(optimizer, count):
    _, state = jax.jit(optimizer.update)(blocks, optimizer.init(blocks))
    update = jax.jit(optimizer.update)
    return lambda: update(blocks, _at(count, state))

  ours = memjax.project(optax.identity(), RANK, refresh_every=EVERY, stagger=False)
  theirs = optax.contrib.scale_by_galore(RANK, EVERY, base_optimizer=optax.identity())
  times = _medians(
    program(ours, 1), program(ours, EVERY), program(theirs, 1), program(theirs, EVERY), more=3
  )
  return times[1] - times[0], times[3] - times[2]


def main(_):
  model = create('llama_60m')
  ours, theirs = _refreshes(model)
  print(f'refresh  {ours:8.4f} s over {theirs:8.4f} s: {ours / theirs:.3f}', flush=True)
  adam, ordinary, refresh_all = _updates(model)
  amortised = ordinary + refresh_all / EVERY
  print(f'update   {amortised:8.4f} s over {adam:8.4f} s: {amortised / adam:.3f}', flush=True)
  adam, galore = _steps(model)
  amortised = galore + refresh_all / EVERY
  print(f'step     {amortised:8.4f} s over {adam:8.4f} s: {amortised / adam:.3f}', flush=True)


if __name__ == '__main__':
  app.run(main)
