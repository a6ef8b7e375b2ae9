"""Reads compiled HLO text: what a program communicates."""

import re
from typing import NamedTuple

_KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
_OPERATION = re.compile(rf'= (.*?) ({_KINDS})(?:-start)?\(')
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,]*)\]')


class Collective(NamedTuple):
  """One array that a collective hands to each device."""

  kind: str
  dtype: str  # As XLA calls it, such as 'f32' or 'bf16'.
  shape: tuple[int, ...]


def collectives(compiled_text: str) -> list[Collective]:
  """Lists every array result of every collective, loop bodies included."""
  found = []
  for line in compiled_text.splitlines():
    if operation := _OPERATION.search(line):
      results, kind = operation.groups()
      for dtype, sizes in _ARRAY.findall(results):
        found.append(Collective(kind, dtype, tuple(int(size) for size in sizes.split(',') if size)))
  return found


def elements(collective: Collective) -> int:
  """Numbers in the array."""
  count = 1
  for size in collective.shape:
    count *= size
  return count
