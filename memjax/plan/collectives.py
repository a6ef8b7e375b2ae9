"""Reads what a compiled program communicates from its HLO text.

A collective counts with the bytes of the whole array: of an all-reduce the array reduced, of an
all-gather the array gathered, of a reduce-scatter the array before it is scattered, of an
all-to-all or a permutation the array that a device hands on. What a link carries follows from the
algorithm: a ring of n devices sends 2 (n - 1) / n of it for an all-reduce, (n - 1) / n for the
others.
"""

import math
import re
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_BRANCH = re.compile(r'\b(?:true|false)_computation=%?([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')
_OPERAND = re.compile(r'%([\w.\-]+)')


class _Instruction(NamedTuple):
  root: str | None  # Of a computation's result.
  name: str
  shape: str  # As written, a tuple in parentheses.
  operation: str
  rest: str  # Operands and attributes.


def count(compiled_text: str) -> dict[str, int]:
  """Returns bytes per step per device of each kind of collective that a program contains.

  An asynchronous one counts once, a loop's as often as it runs; a loop whose number of turns is not
  in the program counts once (`unknown_loops` names it). Of a conditional's branches the one that
  moves most counts.

  Args:
    compiled_text: `compiled.as_text()`.
  """
  module = _Module(compiled_text)
  found = module.moved(module.entry)
  return {kind: found[kind] for kind in KINDS if found.get(kind)}


def unknown_loops(compiled_text: str) -> list[str]:
  """Returns the names of the loops with collectives in them that `count` counts once."""
  module = _Module(compiled_text)
  module.moved(module.entry)
  return sorted(module.unknown)


class _Module:
  """The computations of a module, and what each moves."""

  def __init__(self, text):
    self.unknown = set()
    self._moved = {}
    self._computations, self.entry = _parse(text)

  def moved(self, name) -> dict[str, int]:
    """Bytes by kind of one run of a computation and all it calls."""
    if name not in self._moved:
      self._moved[name] = self._measure(self._computations.get(name, {}))
    return self._moved[name]

  def _measure(self, instructions) -> dict[str, int]:
    total, seen = {}, set()
    for instruction in instructions.values():
      if instruction.operation == 'fusion':
        # A TPU overlaps a collective with several fusions, each of which repeats it.
        inner = self._in_fusion(_called(instruction, 'calls'), seen)
      elif instruction.operation == 'while':
        inner = self._loop(instruction)
      elif instruction.operation == 'conditional':
        inner = _most([self.moved(branch) for branch in _branches(instruction.rest)])
      elif instruction.operation in ('call', 'async-start', 'custom-call'):
        callee = _called(instruction, 'calls') or _called(instruction, 'to_apply')
        inner = self.moved(callee)
      else:
        inner = _own(instruction, instructions)
      _add(total, inner)
    return total

  def _loop(self, instruction) -> dict[str, int]:
    inner = dict(self.moved(_called(instruction, 'body')))
    _add(inner, self.moved(_called(instruction, 'condition')))
    if not inner:
      return inner
    trips = self._trips(instruction)
    if trips is None:
      self.unknown.add(instruction.name)
    return {kind: size * (1 if trips is None else trips) for kind, size in inner.items()}

  def _trips(self, instruction) -> int | None:
    if known := _TRIPS.search(instruction.rest):
      return int(known[1])
    condition = self._computations.get(_called(instruction, 'condition'), {})
    return _bound(condition, self._computations)

  def _in_fusion(self, name, seen) -> dict[str, int]:
    total, fused = {}, self._computations.get(name, {})
    for instruction in fused.values():
      if instruction.operation == 'fusion':
        _add(total, self._in_fusion(_called(instruction, 'calls'), seen))
        continue
      own = _own(instruction, fused)
      channel = _CHANNEL.search(instruction.rest)
      if not own or (channel and channel[1] in seen):
        continue
      seen.add(channel and channel[1])
      if 'all-reduce-scatter' in name:  # How a TPU writes a reduce-scatter.
        own = {'reduce-scatter': sum(own.values())}
      _add(total, own)
    return total


def _parse(text):
  computations, current, entry = {}, None, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      instruction = _Instruction(*match.groups())
      current[instruction.name] = instruction
  return computations, entry


def _own(instruction, computation) -> dict[str, int]:
  """Bytes of one collective; a start and its done are one, and count where the array is whole."""
  operation, scatter = instruction.operation, 'reduce-scatter'
  if operation in (scatter, f'{scatter}-start'):
    operands = (computation.get(name) for name in _operands(instruction))
    return {scatter: sum(_bytes(operand.shape) for operand in operands if operand)}
  kind = operation.removesuffix('-done')
  if kind not in KINDS or kind == scatter:
    return {}
  return {kind: _bytes(instruction.shape)}


def _operands(instruction) -> list[str]:
  return _OPERAND.findall(instruction.rest.split(')')[0])


def _bytes(shape: str) -> int:
  total = 0
  for dtype, sizes in _ARRAY.findall(shape):
    elements = math.prod(int(size) for size in sizes.split(',') if size)
    total += math.ceil(elements * _bits(dtype) / 8)
  return total


def _bits(dtype: str) -> int:
  if dtype == 'pred':
    return 8
  width = re.match(r'[a-z]+(\d+)', dtype)
  return int(width[1]) if width else 0  # A token has no bytes.


def _called(instruction, role) -> str | None:
  return next((name for r, name in _CALLED.findall(instruction.rest) if r == role), None)


def _branches(rest) -> list[str]:
  if match := _BRANCHES.search(rest):
    return [name.strip().lstrip('%') for name in match[1].split(',')]
  return _BRANCH.findall(rest)


def _bound(condition, computations) -> int | None:
  """The constant n of a loop that runs while its counter is below n; JAX's counters start at 0."""
  root = next((i for i in condition.values() if i.root), None)
  compare = root
  if root is not None and root.operation == 'fusion':
    fused = computations.get(_called(root, 'calls'), {})
    compare = next((i for i in fused.values() if i.root), None)
  if compare is None or compare.operation != 'compare' or 'direction=LT' not in compare.rest:
    return None
  operands = [condition.get(name) for name in _operands(root)]
  constants = [int(x.rest.split(')')[0]) for x in operands if x and x.operation == 'constant']
  return constants[0] if len(constants) == 1 else None


def _most(options) -> dict[str, int]:
  return max(options, key=lambda moved: sum(moved.values()), default={})


def _add(total, more) -> None:
  for kind, size in more.items():
    total[kind] = total.get(kind, 0) + size
