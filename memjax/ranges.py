"""Between which numbers each field of a config lies."""

import math

from ml_collections import ConfigDict

# Words -> the check they stand for. NaN compares as false, so that none lets it pass.
_KINDS = {
  'at least 1': lambda x: x >= 1,
  'at least 0': lambda x: x >= 0,
  'above 0': lambda x: x > 0,
  'at least 0 and below 1': lambda x: 0 <= x < 1,
  'above 0 and below 1': lambda x: 0 < x < 1,
  'a number of 64 bits': lambda x: -(2**63) <= x < 2**63,  # What a random key is made from.
}

RANGES = {
  'at least 1': (
    'steps',
    'batch_size',
    'accumulate',
    'seq_len',
    'log_every',
    'checkpoint.every',
    'checkpoint.keep',
    'hybrid.layers',
  ),
  'at least 0': (
    'clip_norm',
    'eval_every',
    'eval_tokens',
    'checkpoint.keep_every',
    'cpu_devices',
    'data.max_tokens',
    'groups.size',
    'groups.every',
    'hybrid.learning_rate',
    'optimizer.adam_eps',
    'optimizer.eps',
    'optimizer.learning_rate',
    'optimizer.weight_decay',
    'sample.tokens',
    'sample.temperature',
    'schedule.final_ratio',
    'schedule.restart_every',
    'schedule.restart_warmup',
    'schedule.adjust_step',
    'task.new_tokens',
  ),
  'above 0': ('layer_scale',),
  'at least 0 and below 1': (
    'schedule.warmup_ratio',
    'optimizer.adam_b1',
    'optimizer.adam_b2',
    'optimizer.b1',
    'optimizer.b2',
    'optimizer.b3',
    'optimizer.momentum',
  ),
  'above 0 and below 1': ('data.validation_fraction',),
  'a number of 64 bits': ('seed', 'optimizer.seed'),
}


def check(c: ConfigDict) -> None:
  """Checks the numbers of a config, of its optimizer those that it takes.

  Raises:
    ValueError: naming the field, its value and where it may lie.
  """
  for words, fields in RANGES.items():
    for field in fields:
      *group, name = field.split('.')
      value = (c[group[0]] if group else c).get(name)
      if not isinstance(value, (int, float)):
        continue  # Not there, or None for the method's own.
      if value == math.inf or not _KINDS[words](value):
        raise ValueError(f'config.{field} is {value}; it must be {words}')
