"""The form of a table that says what a model family is called in Hugging Face checkpoints.

A table is data: our leaf paths, the names of tensors, and how one becomes the other. Reading,
writing, sharding and every check are written once over it.

  FAMILY = Family(
    name='llama',
    architectures=('LlamaForCausalLM',),
    holds=lambda model: isinstance(model, Llama),
    to_model=to_model,
    to_config=to_config,
    names=names,
    prefix='model.',
  )

Our block parameters are stacked `[L, ...]`; theirs are one tensor a layer, so a name speaks of one
layer: its key has '{layer}' where its path begins with 'blocks/'.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

Shape = tuple[int, ...]
Index = tuple[slice, ...]

BLOCKS = 'blocks/'  # What paths of stacked leaves begin with.


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a tensor of a checkpoint becomes one of ours: a range of one of its axes, then transposed.

  Attributes:
    transpose: Whether ours is the transpose of what is taken. PyTorch's linear maps are `[out, in]`
      and ours `[in, out]`; norms, biases, embeddings and GPT-2's matrices lie as ours.
    axis: Axis of their tensor along which several of ours lie one after the other.
    start: Where ours begins on that axis.
    stop: Where it ends; None when the tensor is ours alone.
  """

  transpose: bool = False
  axis: int = 0
  start: int = 0
  stop: int | None = None

  def index(self, index: Index, shape: Shape) -> Index:
    """Returns where in their tensor a part of ours lies.

    Args:
      index: One slice an axis of ours, of step 1.
      shape: Shape of ours, one layer.
    """
    spans = [slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]
    spans = spans[::-1] if self.transpose else spans
    if self.stop is not None:
      own = spans[self.axis]
      spans[self.axis] = slice(self.start + own.start, self.start + own.stop)
    return tuple(spans)

  def shape(self, shape: Shape) -> Shape:
    """Returns the shape of what is taken of their tensor for one of ours."""
    return shape[::-1] if self.transpose else shape


SAME = Rule()
TRANSPOSE = Rule(transpose=True)


def split(*sizes: int, axis: int = 0, transpose: bool = True) -> tuple[Rule, ...]:
  """Returns the rules of matrices that lie one after the other in one tensor.

  >>> [(rule.start, rule.stop) for rule in split(8, 2, 2)]
  [(0, 8), (8, 10), (10, 12)]
  """
  starts = [sum(sizes[:i]) for i in range(len(sizes))]
  return tuple(Rule(transpose, axis, start, start + n) for start, n in zip(starts, sizes))


@dataclasses.dataclass(frozen=True)
class Name:
  """One of our leaves and the tensor it comes from, in each layer where it belongs to the blocks.

  Attributes:
    path: Our leaf, 'blocks/attn/q/kernel'.
    key: Their tensor, 'model.layers.{layer}.self_attn.q_proj.weight'. Several names may share a key
      when their rules split it.
    rule: How the tensor becomes our leaf, of one layer.
    drawn: Whether the leaf is drawn at random where the checkpoint lacks it, as a new task's head
      is. Otherwise a missing tensor is an error.
  """

  path: str
  key: str
  rule: Rule = SAME
  drawn: bool = False


def linear(path: str, key: str, bias: bool = False, **fields: Any) -> tuple[Name, ...]:
  """Returns the names of a linear map, `kernel` and perhaps `bias`.

  >>> [(name.path, name.key) for name in linear('head', 'lm_head')]
  [('head/kernel', 'lm_head.weight')]
  """
  kernel = Name(f'{path}/kernel', f'{key}.weight', TRANSPOSE, **fields)
  return (kernel, Name(f'{path}/bias', f'{key}.bias', **fields)) if bias else (kernel,)


def layer_norm(path: str, key: str, **fields: Any) -> tuple[Name, ...]:
  """Returns the names of a layer norm, `scale` and `bias`."""
  return (
    Name(f'{path}/scale', f'{key}.weight', **fields),
    Name(f'{path}/bias', f'{key}.bias', **fields),
  )


@dataclasses.dataclass(frozen=True)
class Family:
  """What one family of models is called in Hugging Face checkpoints.

  Attributes:
    name: `model_type` in `config.json`.
    architectures: `architectures` in `config.json`, the one that `to_config` writes first.
    holds: Whether this family can describe a model of ours; the first of `FAMILIES` that does is
      what `save` writes.
    to_model: From a `Config` to a model, a frozen dataclass with `abstract`. Whatever in the config
      changes the mathematics and is not ours is refused with `Config.check`.
    to_config: From a model to the fields of `config.json`, `architectures` and `model_type` too.
    names: From a model to every leaf's name. A tied head is not a leaf.
    prefix: What keys begin with unless the bare model was saved, without a head: 'model.'.
    ignored: Regular expressions searched in the keys that no name mentions; what matches holds
      nothing of its own (buffers, the copy that a tied head is), and anything else is an error.
    spellings: Pairs of a part of a key and what older checkpoints have in its place.
  """

  name: str
  architectures: tuple[str, ...]
  holds: Callable[[Any], bool]
  to_model: Callable[['Config'], Any]
  to_config: Callable[[Any], dict[str, Any]]
  names: Callable[[Any], tuple[Name, ...]]
  prefix: str = ''
  ignored: tuple[str, ...] = ()
  spellings: tuple[tuple[str, str], ...] = ()


class Config(dict):
  """What `config.json` says; a field that is missing is an error that names it and the file."""

  def __init__(self, fields: dict[str, Any], path: pathlib.Path | str = 'config.json'):
    super().__init__(fields)
    self.path = path

  def __missing__(self, field: str):
    raise ValueError(f'{self.path}: {field!r} is missing, which every {self.type} model has')

  @property
  def type(self) -> str:
    """The family's name."""
    return self.get('model_type', 'Hugging Face')

  def either(self, field: str, default: Any) -> Any:
    """Returns a field, or `default` where it is absent or null."""
    value = self.get(field)
    return default if value is None else value

  def check(self, field: str, *known: Any) -> None:
    """Refuses a field whose value would change the mathematics into what no model here computes.

    Args:
      field: Name of the field.
      *known: What it may be, first what it is when absent.

    Raises:
      ValueError: naming the file, the field and what it may be.
    """
    value = self.either(field, known[0])
    if value not in known:
      allowed = ' or '.join(map(repr, known))
      raise ValueError(
        f'{self.path}: {field!r} is {value!r}; models of type {self.type!r} are computed here '
        f'with {allowed} only'
      )
