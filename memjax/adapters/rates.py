"""Rates of learning for the parts of an adapted weight."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from memjax.naming import path_string

PARTS = ('a', 'b', 'magnitude', 'gate')


def labels(trained: Any) -> Any:
  """Returns what each trained leaf is, for `optax.partition`.

  Args:
    trained: As `memjax.adapters.trainable` returns it, or a tree of its structure. A dict with an
      entry `b` and no others than parts of adapted weights is taken for one.

  Returns:
    The same tree with one of `'a'`, `'b'`, `'magnitude'` (of DoRA), `'gate'` (of SoRA) and `'rest'`
    in place of each leaf.

  >>> labels({'kernel': {'a': 0, 'b': 1}, 'dense': {'w': 2, 'b': 3}, 'head': None})
  {'dense': {'b': 'rest', 'w': 'rest'}, 'head': None, 'kernel': {'a': 'a', 'b': 'b'}}
  """

  def label(path, node):
    if not _is_adapted(node):
      return 'rest'
    return jax.tree.map_with_path(lambda path, _: path_string(path[-1:]), node)

  return jax.tree.map_with_path(label, trained, is_leaf=_is_adapted)


def _is_adapted(node) -> bool:
  """Whether a node has the form that an adapted weight has in a tree of what is trained."""
  if not isinstance(node, dict) or not set(node) <= {*PARTS, 'adapted'}:
    return False
  return 'b' in node or _is_adapted(node.get('adapted'))


def only(part: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transform of one part's updates alone; others pass."""
  return optax.masked(
    transform, lambda tree: jax.tree.map(lambda label: label == part, labels(tree))
  )


def lora_plus(
  optimizer: Callable[[Any], optax.GradientTransformation], learning_rate: Any, ratio: float = 16.0
) -> optax.GradientTransformation:
  """LoRA+: an optimizer with a larger learning rate for B.

  B begins at zero and A does not, so that in wide models, at one rate, A hardly learns features.

  Args:
    optimizer: Function of a learning rate, such as `optax.adam`.
    learning_rate: Of all but B; a number or a schedule.
    ratio: B's over that.

  >>> trained = {'kernel': {'a': jax.numpy.ones((2, 1)), 'b': jax.numpy.ones((1, 2))}}
  >>> transform = lora_plus(optax.sgd, 0.1)
  >>> updates, _ = transform.update(trained, transform.init(trained))
  >>> [round(float(updates['kernel'][part].sum()), 3) for part in 'ab']
  [-0.2, -3.2]

  References:
    Hayou et al., `LoRA+: Efficient Low Rank Adaptation of Large Models
    <https://arxiv.org/abs/2402.12354>`_, 2024
  """
  faster = lambda count: ratio * learning_rate(count)
  of_b = faster if callable(learning_rate) else ratio * learning_rate
  slow = {part: optimizer(learning_rate) for part in (*PARTS, 'rest') if part != 'b'}
  return optax.partition({**slow, 'b': optimizer(of_b)}, labels)


def optimizer_of(
  spec: Any, transform: optax.GradientTransformation, learning_rate: Any
) -> optax.GradientTransformation:
  """Returns the optimizer of a run with adapters: `transform`, and what the specification adds.

  Args:
    spec: A specification, with or without `optimizer(transform, learning_rate)`; None for none.
    transform: Its updates are added to what is trained.
    learning_rate: Of `transform`; a number or a schedule.
  """
  around = getattr(spec, 'optimizer', None)
  return transform if around is None else around(transform, learning_rate)
