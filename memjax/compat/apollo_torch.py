"""`apollo-torch` 1.0.3 (zhuhanqing/APOLLO)."""

from collections.abc import Callable

import jax
import optax

from memjax.compat.hf_adam import decay_updated, scale_by_hf_adam, scale_by_hf_bias
from memjax.transforms.bases import Basis, random_projection, svd
from memjax.transforms.lifts import rescale
from memjax.transforms.limiter import limit_norm_growth
from memjax.transforms.project import project
from memjax.transforms.targets import Targets, default_targets


def apollo_adamw(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  correct_bias: bool = True,
  scale_front: bool = False,
  disable_nl: bool = False,
  no_deprecation_warning: bool = True,
  *,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  proj: str = 'random',
  proj_type: str = 'std',
  scale_type: str = 'channel',
  targets: Targets = None,
  projection_fn: Callable[[str, tuple[int, ...], jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`apollo_torch.APOLLOAdamW` 1.0.3, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients and projections:
    - `scale` enters as its root.
    - `eps` is added to the root of the second moment before its bias correction.
    - Factors and limited norms come from moments without bias correction; it scales the limited
      update.
    - Weight decay comes last and acts on the updated weight, `p -= s u; p -= lr wd p`.
    - All projections are new in the same update, when `count % update_proj_gap == 0`; moments stay
      as they are.
    - A square kernel is projected on its input side.

  Left out:
    - The bits of PyTorch's generators: `projection_fn` supplies projections, else JAX draws them.
    - Keeping a random projection between its draws.
    - The 1e-8 in the denominators of factors and limits: a matrix whose first gradient is zero
      starts from its first other one, and not from a norm of 1e-8 that grows by 1 % an update.
    - The order in which `scale_front` has the scale and the limit applied, which differs in
      rounding only.
    - `proj_type` other than `'std'`, which takes norms over the wrong axis there.
    - Signs of singular vectors and bases in the gradient's dtype, see `galore_adamw`.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: See above.
    weight_decay: Decoupled decay.
    correct_bias: Whether the step size corrects the moments' bias.
    scale_front: See above; changes nothing here.
    disable_nl: Whether to leave out the limit on the growth of norms.
    no_deprecation_warning: Changes nothing.
    rank: Subspace dimension; the package's Mini is 1.
    update_proj_gap: Updates between two projections.
    scale: Square of the factor on projected updates; the package's Mini scripts use 128.
    proj: `'random'` or `'svd'`.
    proj_type: `'std'`.
    scale_type: `'channel'` or, as in Mini, `'tensor'`.
    targets: Leaves of the package's low-rank group, as in `project`; `default_targets` if None.
      Other leaves get its plain AdamW.
    projection_fn: `(path, shape, refresh)` to the random projection of a leaf, of the shape that
      the package holds: `[..., rank, in]` for kernels with `in <= out`, `[..., out, rank]` for
      others. `refresh` i32[] counts from 0; the function is traced in every update.
    seed: Of the projections that JAX draws.

  Returns:
    A transform that needs `params` if `weight_decay` is not 0.

  Raises:
    ValueError: for an unknown word; at `init` for a kernel with a side below `rank`; and as
      `project`.
  """
  del scale_front, no_deprecation_warning
  if proj_type != 'std':
    raise ValueError(
      f"proj_type must be 'std', as no other works in the package; got {proj_type!r}"
    )
  if proj not in ('random', 'svd'):
    raise ValueError(f"proj must be 'random' or 'svd', got {proj!r}")

  def leaf_rank(path, leaf):
    if proj == 'random' and rank > min(leaf.shape[-2:]):
      raise ValueError(
        f'{path}: shape {tuple(leaf.shape)} has a side below rank {rank}; lower rank, or leave '
        'the leaf to AdamW with targets'
      )
    return min(rank, *leaf.shape[-2:])

  limit = optax.identity() if disable_nl else limit_norm_growth()
  return optax.chain(
    project(
      scale_by_hf_adam(*betas, eps, correct_bias=False),
      rank=leaf_rank,
      refresh_every=update_proj_gap,
      basis=svd() if proj == 'svd' else _drawn(projection_fn),
      scale=scale**0.5,
      stagger=False,
      targets=default_targets if targets is None else targets,
      lift=rescale(scale_type, limit),
      seed=seed,
    ),
    scale_by_hf_bias(*betas) if correct_bias else optax.identity(),
    optax.scale_by_learning_rate(lr),
    decay_updated(lr, weight_decay),
  )


def _drawn(projection_fn) -> Basis:
  if projection_fn is None:
    return random_projection()

  def draw(address, shape):
    *batch, side, rank = shape
    # A Flax kernel [in, out] is the package's weight transposed; so are projections of its inputs.
    inputs = address.axis == -2
    official = (*batch, rank, side) if inputs else (*batch, side, rank)
    projection = projection_fn(address.path, official, address.refresh[0] - 1)
    return projection.mT if inputs else projection

  return Basis(None, draw)
