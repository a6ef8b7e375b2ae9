"""Arguments that official classes take and that cannot be had here, so that calls can be pasted."""

from typing import Any


def only_default(name: str, value: Any, default: Any, instead: str) -> None:
  """Refuses an argument that is not reproduced, unless it is the official default.

  Args:
    name: Of the argument.
    value: What was given.
    default: What the official class has.
    instead: What to do, for the end of the sentence.

  Raises:
    ValueError: for a value that is not the default.
  """
  if value != default:
    raise ValueError(f'{name}={value!r} is not reproduced, only {name}={default!r}; {instead}')


def check_bitsandbytes(
  amsgrad, optim_bits, args, is_paged, percentile_clipping=100, block_wise=True
) -> None:
  """Refuses what the 8-bit optimizers of bitsandbytes have no, or no more, meaning for."""
  only_default('amsgrad', amsgrad, False, 'the package has no 8-bit AMSGrad either')
  only_default('optim_bits', optim_bits, 32, 'the class stands for 8 bits whatever it says')
  only_default('args', args, None, 'pass the arguments themselves')
  only_default('is_paged', is_paged, False, 'config.offload_state keeps state in host memory')
  clip = 'clip gradients before, with optax.clip_by_global_norm'
  only_default('percentile_clipping', percentile_clipping, 100, clip)
  only_default('block_wise', block_wise, True, 'the package has blocks alone by now')
