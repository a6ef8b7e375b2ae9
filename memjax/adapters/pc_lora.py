"""PC-LoRA: weights fade away while factors learn to do without them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters.lora import LoRA
from memjax.adapters.merge import detach
from memjax.models.remat import rematerialise
from memjax.naming import nearest

# What is left of W after a share q of the updates, in [0, 1].
FADES: dict[str, Callable] = {
  'linear': lambda q: 1 - q,
  'sine': lambda q: 1 - jnp.sin(jnp.pi / 2 * q),  # Fast at first.
  'cosine': lambda q: jnp.cos(jnp.pi / 2 * q),  # Slow at first.
  'step': lambda q: jnp.where(q < 1, 1.0, 0.0),  # At once.
}


@dataclasses.dataclass(frozen=True)
class PCLoRA(LoRA):
  """`l W + s A B`, l going from 1 to 0, for `memjax.adapters.attach`; then `compressed`.

  The loss is `task_share` of the task's and for the rest the mean squared distance of the hidden
  states after every block from those of the model without adapters, which runs along. Where linear
  maps have biases, `rest='bias'` trains them, in place of fading them and training others.

  Attributes:
    fade: A key of `FADES`.
    fade_steps: Updates until W is gone.
    task_share: Of the loss; 1 for no distillation. No published value is known.

  References:
    Hwang et al., `PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge
    Distillation <https://arxiv.org/abs/2406.09117>`_, 2024
  """

  fade: str = 'linear'
  fade_steps: int = 800
  task_share: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    if self.fade not in FADES:
      raise ValueError(f'fade {self.fade!r} does not exist; {nearest(self.fade, FADES)}')
    if self.fade_steps < 1:
      raise ValueError(f'fade_steps is {self.fade_steps}; weights fade over at least one update')
    if not 0 <= self.task_share <= 1:
      raise ValueError(f'task_share is {self.task_share}, not a fraction')

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Fading:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    return weights.Fading(super().adapt(matrix, key), jnp.ones((), jnp.float32))

  def share(self, step: jax.Array) -> jax.Array:
    """Returns what is left of W after a count of finished updates, f32[]."""
    done = jnp.clip(jnp.asarray(step, jnp.float32) / self.fade_steps, 0, 1)
    # A cosine ends a rounding away from zero.
    return jnp.where(done < 1, FADES[self.fade](done), 0.0)

  def advance(self, state: dict, key: jax.Array) -> dict:
    """Returns the training state with what is left of the weights in this step."""
    state = super().advance(state, key)
    share = self.share(state['step'])

    def set_share(leaf):
      if not isinstance(leaf, weights.Fading):
        return leaf
      return dataclasses.replace(leaf, share=jnp.broadcast_to(share, leaf.share.shape))

    params = jax.tree.map(set_share, state['params'], is_leaf=weights.is_weight)
    return {**state, 'params': params}

  def loss(self, model: Any) -> Callable:
    """Returns the loss of a model that is trained so."""
    return model.loss if self.task_share == 1 else distilled(model, self.task_share)


def distilled(model: Any, task_share: float) -> Callable:
  """Returns `loss(params, batch) -> (sum, count)`, of the task and of the hidden states.

  The model without adapters goes through the blocks beside the one with them: hidden states of one
  block are compared at a time and none are kept, but the time of a forward pass is added.

  Args:
    model: Has `embed`, `block`, `head_loss` and `remat`, as `memjax.models.Llama`.
    task_share: Of the task's loss; the others' is the rest.
  """
  block = rematerialise(model.block, model.remat)

  def loss(params, batch):
    teacher = detach(params)
    mask = batch['weights'].astype(jnp.float32)

    def body(carry, layers):
      x, y, total = carry
      x, y = block(layers[0], x), jax.lax.stop_gradient(model.block(layers[1], y))
      apart = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))
      return (x, y, total + jnp.sum(mask * jnp.mean(apart, axis=-1))), None

    x, y = (model.embed(each, batch['tokens']) for each in (params, teacher))
    start = (x, jax.lax.stop_gradient(y), jnp.float32(0))
    stacks = (params['blocks'], teacher['blocks'])
    (x, _, apart), _ = jax.lax.scan(body, start, stacks)
    task, count = model.head_loss(params, x, batch['targets'], batch['weights'])
    depth = jax.tree.leaves(params['blocks'])[0].shape[0]
    return task_share * task + (1 - task_share) * apart / depth, count

  return loss


def compressed(params: Any) -> Any:
  """Returns the parameters without the weights that have faded: products of two factors each.

  The model computes with them as they are; `memjax.adapters.save_products` writes them. Not under
  `jit`: it looks at what is left.

  Raises:
    ValueError: naming a leaf whose weight is not gone yet, or when no leaf has faded.
  """
  found = []

  def export(path, leaf):
    if not isinstance(leaf, weights.Fading):
      return leaf.value if isinstance(leaf, weights.Frozen) else leaf
    if (left := float(jnp.max(leaf.share))) > 0:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'{name}: {left:.3g} of the weight is left, and would be lost; train until fade_steps, and '
        'one update more'
      )
    found.append(path)
    inner = leaf.adapted
    return weights.Product(inner.a, inner.b, inner.scale)

  exported = jax.tree.map_with_path(export, params, is_leaf=weights.is_weight)
  if not found:
    raise ValueError('no leaf is one that fades; attach memjax.adapters.PCLoRA and train')
  return exported
