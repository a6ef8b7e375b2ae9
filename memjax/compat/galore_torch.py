"""`galore-torch` 1.0 (jiaweizzhao/GaLore)."""

import optax

from memjax.compat.hf_adam import decay_updated, scale_by_hf_adam
from memjax.transforms.bases import svd
from memjax.transforms.project import project
from memjax.transforms.targets import Targets, default_targets

# The package's names to ours. A Flax kernel [in, out] is its weight [out, in] transposed.
PROJ_TYPES = {
  'std': 'short',
  'reverse_std': 'long',
  'left': 'right',
  'right': 'left',
  'full': 'both',
}


def galore_adamw(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  correct_bias: bool = True,
  no_deprecation_warning: bool = False,
  *,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  proj_type: str = 'std',
  targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """`galore_torch.GaLoreAdamW` 1.0, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - `eps` is added to the root of the second moment before its bias correction.
    - Weight decay comes last and acts on the updated weight, `p -= s u; p -= lr wd p`.
    - Every basis comes from an exact SVD of the current gradient, all in the same update, when
      `count % update_proj_gap == 0`; moments stay as they are.
    - A square kernel is projected on its input side by `'std'`, on its output side by
      `'reverse_std'`.
    - A rank above the shorter side is cut to it: Adam in a rotated basis, with more state than
      plain Adam.
    - Projected leaves decay by `lr`, not by `lr * scale`.

  Left out:
    - The signs of singular vectors, which LAPACK leaves open and which change the result from the
      second basis on: here the largest entry of each vector is positive.
    - The crash of `'reverse_std'` on a kernel with more inputs than outputs whose rank reaches the
      outputs: here it works.
    - Bases in the gradient's dtype: here they are f32.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: See above.
    weight_decay: Decoupled decay.
    correct_bias: Whether the step size corrects the moments' bias.
    no_deprecation_warning: Changes nothing.
    rank: Subspace dimension.
    update_proj_gap: Updates between two bases.
    scale: Factor on projected updates; the package's training scripts use 0.25.
    proj_type: `'std'`, `'reverse_std'`, `'left'`, `'right'` or `'full'`, in the package's sense:
      `'left'` projects the outputs.
    targets: Leaves of the package's GaLore group, as in `project`; `default_targets` if None. Other
      leaves get its plain AdamW.

  Returns:
    A transform that needs `params` if `weight_decay` is not 0.

  Raises:
    ValueError: for an unknown `proj_type`, and as `project`.
  """
  del no_deprecation_warning
  if proj_type not in PROJ_TYPES:
    raise ValueError(f'proj_type must be one of {", ".join(PROJ_TYPES)}; got {proj_type!r}')
  projected = project(
    scale_by_hf_adam(*betas, eps, correct_bias),
    rank=lambda _, leaf: min(rank, *leaf.shape[-2:]),
    side=PROJ_TYPES[proj_type],
    refresh_every=update_proj_gap,
    basis=svd(),
    scale=scale,
    stagger=False,
    targets=default_targets if targets is None else targets,
  )
  return optax.chain(projected, optax.scale_by_learning_rate(lr), decay_updated(lr, weight_decay))
