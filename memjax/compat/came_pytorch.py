"""`came-pytorch` 0.1.3 (yangluo7/CAME)."""

import optax

from memjax import transforms


def came(
  lr: optax.ScalarOrSchedule,
  eps: tuple[float, float] = (1e-30, 1e-16),
  clip_threshold: float = 1.0,
  betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """`came_pytorch.CAME` 0.1.3, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-5 in f32 on the same gradients:
    - No average is corrected for its start at zero.
    - Vectors take the momentum as it is, without confidence.
    - Every matrix is factored, and every leaf decays, norms too.

  Left out:
    - Statistics over the whole of a leaf with more than two axes: a stack is its matrices here.
    - The default `lr=None`, which the package refuses.

  Args:
    lr: Learning rate, or a schedule of the update count; published, 2e-4.
    eps: Added to the squared gradient; to the squared distance from the momentum.
    clip_threshold: Largest RMS of an update before the momentum.
    betas: Decay rates of momentum, second moment and instability.
    weight_decay: Decoupled decay; published, 1e-2.

  Returns:
    A transform that yields updates to be added to the parameters.
  """
  return transforms.came(
    lr,
    *betas,
    eps=eps[0],
    instability_eps=eps[1],
    clipping_threshold=clip_threshold,
    weight_decay=weight_decay,
  )
