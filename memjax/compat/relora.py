"""Guitaricet/relora: the official ReLoRA, by its own argument names."""

from memjax.adapters.relora import ReLoRA


def relora(
  r: int = 128,
  lora_alpha: float = 32,
  lora_dropout: float = 0.1,
  *,
  relora: int,
  keep_original_weights: bool = True,
  reset_optimizer_on_relora: bool = True,
  optimizer_random_pruning: float = 0.0,
  optimizer_magnitude_pruning: float = 0.0,
) -> ReLoRA:
  """Returns what `ReLoRaModel` and `torchrun_main.py` do with these arguments.

  Faithful to what differs from the paper, all of which `memjax.adapters.ReLoRA` mends by default:

  - Both factors are zero until the first restart (`keep_original_weights`), so that until then they
    get no gradient.
  - "Reset" is a random 0.1 % of the moments, and each moment keeps another 0.1 %.
  - The restart comes one update after a multiple of `relora`.

  The learning rate's own quirks are arguments of `memjax.schedules.jagged` and `cycles`
  (`official=True`).

  Args:
    r: Rank.
    lora_alpha: Numerator of the scale.
    lora_dropout: Fraction of the activations dropped before A; the script has 0.1, whatever it is
      told.
    relora: Updates between restarts.
    keep_original_weights: As above; the script always sets it.
    reset_optimizer_on_relora: Prunes 99.9 % at random.
    optimizer_random_pruning: Prunes this fraction at random.
    optimizer_magnitude_pruning: Prunes all but the largest, above this quantile.

  Raises:
    ValueError: unless just one way to prune is chosen, as there.
  """
  ways = (reset_optimizer_on_relora, optimizer_random_pruning, optimizer_magnitude_pruning)
  if sum(map(bool, ways)) != 1:
    raise ValueError(
      'choose one of reset_optimizer_on_relora, optimizer_random_pruning and '
      f'optimizer_magnitude_pruning; got {ways}'
    )
  ratio = optimizer_magnitude_pruning or optimizer_random_pruning or 0.999
  return ReLoRA(
    rank=r,
    alpha=lora_alpha,
    dropout=lora_dropout,
    every=relora,
    prune='magnitude' if optimizer_magnitude_pruning else 'random',
    ratio=ratio,
    apart=True,
    offset=1,
    dead_start=keep_original_weights,
  )
