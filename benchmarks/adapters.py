"""Whether the order of products that counted operations choose is the one that is fastest.

Prints, for eight shapes of `x W + (x A) B` with its backward pass: the form chosen, its operations
and its time over those of the form that a naive program has ('split'), and the fastest measured.
Forms that need no more operations than others are measured in turns, in one process.

    python benchmarks/adapters.py            # minutes on two cores

A choice is right where its time is within a tenth of the fastest: on a CPU two forms whose counts
differ by less than that cannot be told apart.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from memjax import weights
from memjax.weights import forms

# Rows of activations, inputs, outputs, rank: few rows and many, low ranks and high, each side the
# longer.
SHAPES = [
  (256, 1024, 1024, 8),
  (256, 1024, 1024, 256),
  (512, 768, 3072, 8),
  (512, 3072, 768, 64),
  (2048, 512, 512, 8),
  (2048, 512, 512, 64),
  (4096, 256, 1024, 16),
  (4096, 512, 512, 256),
]

_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Measurements of each program; the least counts.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of weights and activations.')


def candidates(shape):
  """The chosen form, the two extremes, and the best of each backward pass by count."""
  best = sorted(forms.forms(), key=lambda form: forms.operations(form, *shape))
  return list(dict.fromkeys([forms.choose(*shape), *forms.NAMED.values(), *best[1:4]]))


def program(form, shape, dtype):
  """Value and gradients in one form, compiled, with its arguments."""
  rows, m, n, rank = shape
  rng = np.random.default_rng(0)
  draw = lambda *sizes: jnp.asarray(rng.standard_normal(sizes) / np.sqrt(sizes[0]), dtype)
  x, w, a, b, dy = draw(rows, m), draw(m, n), draw(m, rank), draw(rank, n), draw(rows, n)

  @jax.jit
  def both_passes(x, w, a, b, dy):
    leaf = lambda a, b: weights.Adapted(w, a, b, form=form)
    y, pull_back = jax.vjp(lambda x, a, b: leaf(a, b).dot(x), x, a, b)
    return y, pull_back(dy)

  return lambda: jax.block_until_ready(both_passes(x, w, a, b, dy))


def seconds(run):
  # On a CPU the processor's time, which other work on the machine changes least.
  clock = time.process_time if jax.default_backend() == 'cpu' else time.perf_counter
  start = clock()
  run()
  return clock() - start


def main(argv):
  del argv
  print('rows      m      n  rank  chosen                        operations   time  fastest')
  right = 0
  for shape in SHAPES:
    tried = candidates(shape)
    runs = [program(form, shape, _DTYPE.value) for form in tried]
    for run in runs:
      run()  # Compiles.
    times = [[seconds(run) for run in runs] for _ in range(_ROUNDS.value)]
    least = dict(zip(tried, map(min, zip(*times))))
    chosen, split = tried[0], forms.NAMED['split']
    fastest = min(least, key=least.get)
    right += least[chosen] <= 1.1 * least[fastest]
    work = forms.operations(chosen, *shape) / forms.operations(split, *shape)
    print(
      '{:4} {:6} {:6} {:5}  {:28}'.format(*shape, ' '.join(chosen)),
      f'{work:11.2f} {least[chosen] / least[split]:6.2f}  {" ".join(fastest)}'
      f' ({least[fastest] / least[split]:.2f})',
    )
  print(f'chosen within a tenth of the fastest measured: {right} of {len(SHAPES)}')


if __name__ == '__main__':
  app.run(main)
