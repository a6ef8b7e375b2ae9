"""`galore-torch` 1.0 (jiaweizzhao/GaLore): its Adafactor."""

import optax

from memjax.compat.galore_torch import PROJ_TYPES
from memjax.compat.transformers_adafactor import scaled_inside, step_sizes, with_step_sizes
from memjax.transforms.bases import svd
from memjax.transforms.project import project
from memjax.transforms.targets import Targets, default_targets


def galore_adafactor(
  lr: optax.ScalarOrSchedule | None = None,
  eps: tuple[float, float] = (1e-30, 1e-3),
  clip_threshold: float = 1.0,
  decay_rate: float = -0.8,
  beta1: float | None = None,
  weight_decay: float = 0.0,
  scale_parameter: bool = True,
  relative_step: bool = True,
  warmup_init: bool = False,
  *,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  proj_type: str = 'std',
  targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """`galore_torch.GaLoreAdafactor` 1.0, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - All of `compat.adafactor`'s quirks; statistics, clipping and momentum are of the projected
      gradient, the parameter scale of the whole weight.
    - Weight decay is times the step size, and not times `scale`.
    - Every basis comes from an exact SVD of the current gradient, all in the same update, when
      `count % update_proj_gap == 0`; momentum and factors stay as they are.
    - A square kernel is projected on its input side by `'std'`, on its output side by
      `'reverse_std'`.

  Left out:
    - The signs of singular vectors; see `compat.galore_adamw`.
    - The crash of `'reverse_std'` on a kernel with more inputs than outputs whose rank reaches the
      outputs: here it works.

  Args:
    lr: As `compat.adafactor`; the package's training scripts pass one, with
      `relative_step=False` and `scale_parameter=False`.
    eps: As `compat.adafactor`.
    clip_threshold: As `compat.adafactor`.
    decay_rate: As `compat.adafactor`.
    beta1: As `compat.adafactor`.
    weight_decay: As `compat.adafactor`.
    scale_parameter: As `compat.adafactor`.
    relative_step: As `compat.adafactor`.
    warmup_init: As `compat.adafactor`.
    rank: Subspace dimension.
    update_proj_gap: Updates between two bases.
    scale: Factor on projected updates.
    proj_type: `'std'`, `'reverse_std'`, `'left'`, `'right'` or `'full'`, in the package's sense.
    targets: Leaves of the package's GaLore group; `default_targets` if None. Other leaves get its
      plain Adafactor.

  Returns:
    A transform that needs `params`.

  Raises:
    ValueError: for an unknown `proj_type`, as `compat.adafactor`, and as `project`.
  """
  if proj_type not in PROJ_TYPES:
    raise ValueError(f'proj_type must be one of {", ".join(PROJ_TYPES)}; got {proj_type!r}')
  projected = project(
    scaled_inside(eps[0], clip_threshold, decay_rate, beta1),
    rank=lambda _, leaf: min(rank, *leaf.shape[-2:]),
    side=PROJ_TYPES[proj_type],
    refresh_every=update_proj_gap,
    basis=svd(),
    scale=scale,
    stagger=False,
    targets=default_targets if targets is None else targets,
  )
  return with_step_sizes(
    projected,
    step_sizes(lr, eps[1], scale_parameter, relative_step, warmup_init),
    weight_decay,
  )
