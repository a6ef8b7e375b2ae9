"""`galore-torch` 1.0 (jiaweizzhao/GaLore), its 8-bit optimizer."""

from typing import Literal

import optax

from memjax.compat.bitsandbytes import scale_by_adam8bit
from memjax.compat.galore_torch import PROJ_TYPES
from memjax.compat.hf_adam import decay_updated
from memjax.compat.pasted import check_bitsandbytes
from memjax.transforms.bases import svd
from memjax.transforms.project import project
from memjax.transforms.targets import Targets, default_targets


def galore_adamw8bit(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 1e-2,
  amsgrad: bool = False,
  optim_bits: int = 32,
  args: None = None,
  min_8bit_size: int = 4096,
  percentile_clipping: int = 100,
  block_wise: bool = True,
  is_paged: bool = False,
  *,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  proj_type: str = 'std',
  targets: Targets = None,
  backend: Literal['cuda', 'cpu'] = 'cuda',
) -> optax.GradientTransformationExtraArgs:
  """`galore_torch.GaLoreAdamW8bit` 1.0 over bitsandbytes, on Flax kernels `[..., in, out]`.

  Reproduced:
    - What `galore_adamw` does with bases: exact SVDs of the current gradient, all in the same
      update, moments kept, rank cut to the shorter side.
    - What `adamw8bit` does with moments: blocks of the flattened projection; a projection with
      fewer than `min_8bit_size` numbers keeps f32 moments; `eps` after bias correction.
    - `weight_decay` is 0.01 by default, unlike `galore_adamw`'s, and acts on updated weights.

  Left out:
    - The signs of singular vectors, see `galore_adamw`.
    - Rounding the projected update to the parameter's dtype before it is projected back.
    - Decay before the step for leaves that are not projected, with bitsandbytes' CPU kernels only.
    - That a gradient which is not finite leaves single weights: an SVD spreads it.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: See above.
    weight_decay: Decoupled decay.
    amsgrad: False.
    optim_bits: 32.
    args: None.
    min_8bit_size: See above.
    percentile_clipping: 100.
    block_wise: True.
    is_paged: False.
    rank: Subspace dimension.
    update_proj_gap: Updates between two bases.
    scale: Factor on projected updates.
    proj_type: As `galore_adamw`.
    targets: As `galore_adamw`.
    backend: Whose 8-bit kernel, see `adamw8bit`.

  Returns:
    A transform that needs `params` if `weight_decay` is not 0.

  Raises:
    ValueError: for an unknown `proj_type`, as `adamw8bit`, and as `project`.
  """
  check_bitsandbytes(amsgrad, optim_bits, args, is_paged, percentile_clipping, block_wise)
  if proj_type not in PROJ_TYPES:
    raise ValueError(f'proj_type must be one of {", ".join(PROJ_TYPES)}; got {proj_type!r}')
  projected = project(
    scale_by_adam8bit(betas, eps, min_8bit_size, backend=backend),
    rank=lambda _, leaf: min(rank, *leaf.shape[-2:]),
    side=PROJ_TYPES[proj_type],
    refresh_every=update_proj_gap,
    basis=svd(),
    scale=scale,
    stagger=False,
    targets=default_targets if targets is None else targets,
  )
  return optax.chain(projected, optax.scale_by_learning_rate(lr), decay_updated(lr, weight_decay))
