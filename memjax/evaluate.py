"""Validation loss: summed over tokens in f32, divided once.

The module is also the function that measures what is on disk: `memjax.evaluate('runs/glue')` is
`memjax.tasks.evaluate_folder`.
"""

import functools
import math
import sys
import types

import jax


def evaluate(eval_step, params, split, batch, *, max_tokens=0, stop=lambda: False) -> dict | None:
  """Returns the mean loss over a validation split, in file order.

  Every token counts once and equally, however the split falls into batches and devices.

  Args:
    eval_step: `eval_step(params, batch) -> (sum f32[], count f32[])`, jitted.
    params: Parameters.
    split: A `memjax.data.Split`.
    batch: One batch as shapes with shardings.
    max_tokens: Stops after so many tokens, rounded up to a batch; 0 takes all.
    stop: Asked before every batch; when it says yes, the evaluation is given up.

  Returns:
    `eval/loss` (nats a token), `eval/perplexity`, `eval/tokens`; None when given up.
  """
  batch_size, seq_len = batch['tokens'].shape[0], batch['tokens'].shape[-1]
  batches = split.eval_batches(batch_size)
  if max_tokens:
    batches = min(batches, math.ceil(max_tokens / (batch_size * seq_len)))
  total = count = 0.0
  for index in range(batches):
    if stop():
      return None
    rows = functools.partial(split.eval_rows, index, batch_size)
    # One batch at a time: programs that communicate and do not depend on each other can block each
    # other on a CPU.
    part, tokens = jax.device_get(eval_step(params, place(rows, batch)))
    total, count = total + float(part), count + float(tokens)
  loss = total / count
  return {'eval/loss': loss, 'eval/perplexity': math.exp(min(loss, 700.0)), 'eval/tokens': count}


def place(rows, shapes: dict) -> dict:
  """Returns a global batch whose rows were read only where a local device needs them.

  Args:
    rows: `rows(start, stop)` returns a dict of numpy arrays, rows `start:stop` of the batch.
    shapes: The batch as shapes with shardings.
  """
  rows = functools.lru_cache(maxsize=None)(rows)

  def read(name, shape):
    def local(index):
      start, stop, _ = index[0].indices(shape.shape[0])
      return rows(start, stop)[name]

    return jax.make_array_from_callback(shape.shape, shape.sharding, local)

  return {name: read(name, shape) for name, shape in shapes.items()}


class _CallableModule(types.ModuleType):
  """A module that is called like a function, as `memjax.plan` is."""

  def __call__(self, folder, tasks=None, **options):
    from memjax.tasks.report import evaluate_folder

    return evaluate_folder(folder, tasks, **options)


sys.modules[__name__].__class__ = _CallableModule
