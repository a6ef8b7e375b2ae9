"""What every optimizer's update costs beside that of `optax.adamw`.

Prints a table of seconds and ratios on the parameters of the 60M LLaMA: the optimizer alone, update
applied, without forward and backward pass. Each optimizer is measured in turns with AdamW, in one
process, as other work on the machine slows both; the smallest time of each counts, on a CPU of its
threads together. Methods that renew something every so many updates are charged their share of it.

    python benchmarks/transforms.py                        # every optimizer, minutes on two cores
    python benchmarks/transforms.py --only=adafactor,came --json=times.json

Aims, in ratios: 1.3 for factored state, 1.2 for low-rank state, 1.5 for state in 8 bits.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from memjax import models, optimizers

MIB = 2**20

# Arguments without a default, and those of the published runs of a 60M model.
ARGUMENTS = {'rank': 128, 'refresh_every': 200, 'random_after': 10_000, 'head_dim': 64}

_ONLY = flags.DEFINE_list('only', [], 'Names in memjax.optimizers; all without.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Measurements of each program; the least counts.')
_MODEL = flags.DEFINE_string('model', 'llama_60m', 'Whose parameters are updated.')
_JSON = flags.DEFINE_string('json', '', 'File for the same figures.')


class Program:
  """A compiled update that owns its donated state; calling it advances the state."""

  def __init__(self, optimizer, gradient, count):
    self._state = jax.tree.map(jnp.array, gradient), jax.jit(optimizer.init)(gradient)
    self._gradient = gradient

    def step(held, gradient, count):
      params, state = held
      updates, state = optimizer.update(gradient, _at(count, state), params)
      return optax.apply_updates(params, updates), state

    self._step = jax.jit(step, donate_argnums=0)
    # The same every time: an update that renews nothing, or one that renews all. The program must
    # not know it, or it computes at compile time what training computes in every step.
    self._count = jnp.int32(count)
    self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state[1]))

  def seconds(self):
    # On a CPU the processor's time, which other work on the machine changes least.
    clock = time.process_time if jax.default_backend() == 'cpu' else time.perf_counter
    start = clock()
    self._state = jax.block_until_ready(self._step(self._state, self._gradient, self._count))
    return clock() - start


def _at(count, state):
  """The state after `count` updates, as far as its counts and the dates of its refreshes tell."""
  every = ARGUMENTS['refresh_every']
  named = {'count': count, 'due': -(-count // every) * every}  # Due as without lazy intervals.

  def reset(path, x):
    found = [named[n] for entry in path if (n := getattr(entry, 'name', '')) in named]
    return jnp.broadcast_to(found[-1], x.shape) if found else x

  return jax.tree_util.tree_map_with_path(reset, state)


def _least(*programs):
  """The least seconds of each program, run in turns after one warm-up."""
  for program in programs:
    program.seconds()
  times = [[program.seconds() for program in programs] for _ in range(_ROUNDS.value)]
  return [min(column) for column in zip(*times)]


def _make(name, **changes):
  known = optimizers.arguments(name)
  given = {k: v for k, v in {**ARGUMENTS, **changes}.items() if k in known}
  return optimizers.OPTIMIZERS[name](1e-3, **given)


def measure(name, gradient) -> dict:
  """Times one optimizer beside AdamW.

  Returns:
    Seconds of an ordinary update, of AdamW's, and of renewing everything once; the ratio with the
    share of that; bytes of state.
  """
  adamw = Program(optax.adamw(1e-3), gradient, 1)
  every = ARGUMENTS['refresh_every']
  if 'refresh_every' not in optimizers.arguments(name):
    program = Program(_make(name), gradient, 1)
    reference, update = _least(adamw, program)
    renewal = 0.0
  else:
    program = Program(_make(name, stagger=False), gradient, 1)
    all_at_once = Program(_make(name, stagger=False), gradient, every)
    reference, update, renewing = _least(adamw, program, all_at_once)
    renewal = max(0.0, renewing - update)
  return {
    'update': update,
    'adamw': reference,
    'renewal': renewal,
    'ratio': (update + renewal / every) / reference,
    'state_bytes': program.state_bytes,
  }


def main(_):
  rng = np.random.default_rng(0)
  gradient = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
    models.create(_MODEL.value).abstract(),
  )
  table = Table(title=f'one update of {_MODEL.value} on {jax.devices()[0].device_kind}')
  for column in ('optimizer', 'seconds', 'adamw', 'renewal', 'ratio', 'state MiB'):
    table.add_column(column, justify='left' if column == 'optimizer' else 'right')
  found = {}
  for name in _ONLY.value or optimizers.OPTIMIZERS:
    found[name] = row = measure(name, gradient)
    times = [f'{row[key]:.3f}' for key in ('update', 'adamw', 'renewal')]
    table.add_row(name, *times, f'{row["ratio"]:.2f}', f'{row["state_bytes"] / MIB:.1f}')
    print(f'{name}: {row["ratio"]:.2f}', flush=True)
  Console().print(table)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
