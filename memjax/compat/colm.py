"""CoLM's selection as published with the paper: one direction for the whole run."""

from typing import Any

import jax

from memjax.steps import colm as intended
from memjax.steps.selected import Selector

METHODS = ('submodlib', 'weightedsubmodlib')


def colm(
  model: Any,
  pool: int,
  *,
  small_batch_ratio: float = 0.5,
  keep_sources: str = '',
  data_selection_method: str = 'submodlib',
  source_wise_selection: str = 'proportional',
  zo_dim: int = 2560,
  mezo_eps: float = 1e-3,
  sources: int = 16,
  seed: int = 0,
  parts: int = 1,
  leaf: str = 'attn/v/kernel',
) -> Selector:
  """Returns the selector of the official `subset_trainer_distributed.py`, by its arguments.

  Reproduced:
    One direction is drawn for the whole run, so that features are multiples of it, and what is
      compared of an example is one number, its slope. Of exact gradients' choices it meets as many
      as chance does.
    A feature that is not a number makes all similarities of its source -0.95, so that the last
      examples of the source are chosen; chosen itself, it makes the moments no numbers for good.
    A source's share of the places is rounded down; what is left goes one each to the sources with
      the least. Of equals the last is chosen, as by `submodlib`'s lazy greedy.
    Small sources are a list, for MathInstruct '0_1_3_5_7_8_9_10_11_13', and have no part in the
      moments.

  Left out:
    With more examples of small sources than places, the official batches have different shapes on
      different ranks; here the first are taken.
    The efficient trainer divides an example's loss by the padded width of its micro-batch, so that
      features depend on who else is in it; here by the example's own tokens.
    Seeds are set again before every estimate, which gives all steps and ranks the same dropout.
    `source_wise_selection='balanced'` rounds proportional shares at random.
    The noise has the same distribution and other bits.

  Args:
    model: As `memjax.steps.colm.colm`.
    pool: Examples to choose from.
    small_batch_ratio: Share of them that is trained on.
    keep_sources: Numbers of the sources of which all examples are kept, joined by underscores.
    data_selection_method: 'weightedsubmodlib' counts a chosen example as often as it is the
      nearest.
    source_wise_selection: 'proportional' or 'none'.
    zo_dim: Coordinates that are compared; with a single direction their number changes nothing.
    mezo_eps: Size of the perturbation.
    sources: Number of sources, or more.
    seed: Of the direction.
    parts: Micro-batches of the forward pass.
    leaf: Path in a block of the weight that is perturbed.

  Raises:
    ValueError: for an argument out of range.
  """
  if data_selection_method not in METHODS:
    raise ValueError(f'data_selection_method is {data_selection_method!r}, not one of {METHODS}')
  if source_wise_selection not in ('proportional', 'none'):
    raise ValueError(
      f"source_wise_selection is {source_wise_selection!r}, not 'proportional' or 'none'"
    )
  if not 0 < small_batch_ratio <= 1:
    raise ValueError(f'small_batch_ratio is {small_batch_ratio}; it is a share in (0, 1]')
  return intended.colm(
    model,
    int(pool * small_batch_ratio),
    key=jax.random.key(seed),
    features='zeroth_order',
    directions=1,
    redraw=False,
    coordinates=zo_dim,
    budgets=source_wise_selection,
    sources=sources,
    keep_sources=tuple(map(int, filter(None, keep_sources.split('_')))),
    weighted=data_selection_method == 'weightedsubmodlib',
    parts=parts,
    leaf=leaf,
    eps=mezo_eps,
    nan_similarity=-0.95,
  )
