"""`fira` 1.0.2 (xichen-fy/Fira)."""

import optax

from memjax.compat.galore_torch import PROJ_TYPES
from memjax.compat.hf_adam import decay_updated, scale_by_hf_adam, scale_by_hf_bias
from memjax.transforms.bases import svd
from memjax.transforms.lifts import residual
from memjax.transforms.project import project
from memjax.transforms.targets import Targets, default_targets


def fira_adamw(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  correct_bias: bool = True,
  no_deprecation_warning: bool = False,
  *,
  rank: int = 8,
  update_proj_gap: int = 200,
  alpha: float = 1.0,
  proj_type: str = 'std',
  targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """`fira.FiraAdamW` 1.0.2 with `fira.divide_params`, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - The residual is `G - alpha P R`: with `alpha = 0.25` three quarters of the gradient within the
      subspace are in it, too.
    - `eps` is added to the root of the second moment before its bias correction.
    - Factors and limited norms come from moments without bias correction; it scales the sum.
    - Weight decay comes last and acts on the updated weight, `p -= s u; p -= lr wd p`.
    - Every basis comes from an exact SVD of the current gradient, all in the same update, when
      `count % update_proj_gap == 0`; moments stay as they are.
    - A square kernel is projected on its input side by `'std'`, on its output side by
      `'reverse_std'`.
    - A rank above the shorter side is cut to it.

  Left out:
    - The 1e-8 in the denominators of factors and limits, see `apollo_adamw`.
    - Norms over the wrong axis where a projected gradient is no wider than it is high: here they
      are always of the `r` numbers of a channel.
    - Signs of singular vectors and bases in the gradient's dtype, see `galore_adamw`.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: See above.
    weight_decay: Decoupled decay.
    correct_bias: Whether the step size corrects the moments' bias.
    no_deprecation_warning: Changes nothing.
    rank: Subspace dimension.
    update_proj_gap: Updates between two bases.
    alpha: Factor on projected updates; the package's training scripts use 0.25 and less.
    proj_type: `'std'`, `'reverse_std'`, `'left'` or `'right'`, in the package's sense: `'left'`
      projects the outputs.
    targets: Leaves of the package's low-rank group, as in `project`; `default_targets` if None.
      Other leaves get its plain AdamW.

  Returns:
    A transform that needs `params` if `weight_decay` is not 0.

  Raises:
    ValueError: for an unknown `proj_type`, and as `project`.
  """
  del no_deprecation_warning
  types = [name for name in PROJ_TYPES if name != 'full']
  if proj_type not in types:
    raise ValueError(f'proj_type must be one of {", ".join(types)}; got {proj_type!r}')
  return optax.chain(
    project(
      scale_by_hf_adam(*betas, eps, correct_bias=False),
      rank=lambda _, leaf: min(rank, *leaf.shape[-2:]),
      side=PROJ_TYPES[proj_type],
      refresh_every=update_proj_gap,
      basis=svd(),
      scale=alpha,
      stagger=False,
      targets=default_targets if targets is None else targets,
      lift=residual(removed=alpha),
    ),
    scale_by_hf_bias(*betas) if correct_bias else optax.identity(),
    optax.scale_by_learning_rate(lr),
    decay_updated(lr, weight_decay),
  )
