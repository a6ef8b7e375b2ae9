"""From a config's `select` to a selector: the fields, their checks, and what they build."""

import jax
from ml_collections import ConfigDict

from memjax.data import coreset
from memjax.naming import nearest
from memjax.steps.colm import FEATURES, colm
from memjax.steps.selected import Selector, random_rows

NAMES = ('none', 'random', 'colm')


def fields() -> dict:
  """Returns the fields of a config's `select`, with their defaults."""
  return dict(
    name='none',  # Or 'random', or 'colm': batch_size is then the pool that rows are chosen from.
    keep=0,  # Sequences of a pool that are trained on.
    features='exact',  # Of colm: gradients of the last value projection; or 'zeroth_order'.
    directions=64,  # Of zeroth-order features.
    redraw=True,  # Whether every pool has new ones; the published code has one for the whole run.
    coordinates=2560,  # That two examples are compared by, the largest of their source.
    budgets='proportional',  # How many of each source; or 'balanced', or 'none', not by source.
    sources=16,  # At most; a batch's `source` counts them from 0.
    keep_sources='small',  # Kept whole: those below an even share; 'none'; or numbers, as '0_3_5'.
    weighted=False,  # Whether an example counts as often as it is the nearest of the chosen.
    leaf='attn/v/kernel',  # Whose gradients are compared, in the last block.
    parts=1,  # Micro-batches of the pool's forward pass.
  )


def check(c: ConfigDict) -> None:
  """Checks a config's `select` before anything is built.

  Raises:
    ValueError: naming the field and what it may be.
  """
  s = c.select
  for field, known in (('name', NAMES), ('features', FEATURES), ('budgets', coreset.BUDGETS)):
    if s[field] not in known:
      raise ValueError(f'config.select.{field} is {s[field]!r}; {nearest(s[field], known)}')
  if s.name == 'none':
    return
  if not 1 <= s.keep <= c.batch_size:
    raise ValueError(
      f'config.select.keep is {s.keep}; of a pool of config.batch_size {c.batch_size} between 1 '
      'and all can be kept'
    )
  for size, field in ((s.keep, 'accumulate'), (c.batch_size, 'select.parts')):
    number = c.select.parts if field == 'select.parts' else c.accumulate
    if number < 1 or size % number:
      raise ValueError(f'config.{field} is {number}, which does not divide {size} sequences')
  if c.step == 'streamed':
    raise ValueError(
      "config.select needs the layers on the device; set config.step to another than 'streamed'"
    )
  if s.name == 'colm' and c.task.loss != 'tokens':
    raise ValueError(
      f'config.select.name={s.name!r} compares gradients of the loss of tokens, and '
      f"config.task.loss is {c.task.loss!r}; set it to 'tokens', or select.name='random'"
    )
  _kept(s)


def build(c: ConfigDict, model, key: jax.Array) -> Selector | None:
  """Returns the selector of a config, or None.

  Args:
    c: Read for `select`.
    model: Whose gradients are compared.
    key: Root key of the draws.

  Raises:
    ValueError: for a model without pieces.
  """
  s = c.select.to_dict()
  name, keep = s.pop('name'), s.pop('keep')
  if name == 'none':
    return None
  if name == 'random':
    return random_rows(keep, key)
  if not hasattr(model, 'head_loss'):
    raise ValueError(
      f'config.select.name={name!r} runs the last block of a decoder alone, which '
      f"{c.model!r} is not; set select.name='random'"
    )
  return colm(model, keep, key=key, **s | {'keep_sources': _kept(c.select)})


def check_sources(c: ConfigDict, sources: tuple[str, ...]) -> None:
  """Raises a `ValueError` when the data has more sources than a selector was built for."""
  if c.select.name == 'colm' and len(sources) > c.select.sources:
    raise ValueError(
      f'the data has {len(sources)} sources, {", ".join(sources)}; set config.select.sources to '
      'that many'
    )


def _kept(s) -> str | tuple[int, ...]:
  words = {'small': 'small', 'none': ()}
  if s.keep_sources in words:
    return words[s.keep_sources]
  numbers = s.keep_sources.split('_')
  if not all(number.isdigit() and int(number) < s.sources for number in numbers):
    raise ValueError(
      f"config.select.keep_sources is {s.keep_sources!r}; it is 'small', 'none', or numbers below "
      f"config.select.sources {s.sources}, as '0_3_5'"
    )
  return tuple(map(int, numbers))
