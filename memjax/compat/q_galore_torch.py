"""`q-galore-torch` 1.0 (VITA-Group/Q-GaLore)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.compat.bitsandbytes import scale_by_adam8bit
from memjax.compat.hf_adam import decay_updated
from memjax.compat.pasted import check_bitsandbytes, only_default
from memjax.transforms.bases import svd
from memjax.transforms.intervals import Interval
from memjax.transforms.project import project
from memjax.transforms.storage import Storage
from memjax.transforms.targets import Targets, default_targets, plan_leaves


def q_galore_adamw8bit(
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
  quant: bool = False,
  quant_group_size: int = -1,
  quant_n_bit: int = 8,
  cos_threshold: float = 0.4,
  gamma_proj: float = 2,
  queue_size: int = 5,
  proj_type: str = 'std',
  targets: Targets = None,
  backend: Literal['cuda', 'cpu'] = 'cuda',
) -> optax.GradientTransformationExtraArgs:
  """`q_galore_torch.QGaLoreAdamW8bit` 1.0 with float weights, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - Bases are quantised by the least and the largest of each group, to unsigned codes with a zero
      point that is clamped: a group far from zero on one side comes out badly.
    - A group is `quant_group_size` neighbours in the flattened basis, or a row of it for -1.
    - Bases of a kernel with `out >= in` are `[rank, in]`, others `[out, rank]`, flattened as such.
    - A kernel's next basis is due when `count % gap == 0`, `gap` its own. It is multiplied by
      `gamma_proj` when the mean of the last `queue_size` cosines reaches `cos_threshold`, and may
      be again at each refresh, since the queue is not cleared.
    - The cosine is that of the leading singular vectors before quantisation, with its sign.
    - What `adamw8bit` does with moments: blocks of the flattened projection; a projection with
      fewer than `min_8bit_size` numbers keeps f32 moments.
    - Weight decay of projected kernels comes last and acts on the updated weight.

  Left out:
    - 8-bit weights.
    - Bases held as codes: here they are the f32 numbers that the codes stand for.
    - Signs of singular vectors, see `galore_adamw`.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments; the package's scripts use 0.9, 0.95.
    eps: Added to the root of the second moment, after bias correction.
    weight_decay: Decoupled decay.
    amsgrad: False.
    optim_bits: 32.
    args: None.
    min_8bit_size: See above.
    percentile_clipping: 100.
    block_wise: True.
    is_paged: False.
    rank: Subspace dimension.
    update_proj_gap: Updates between two bases, to begin with.
    scale: Factor on projected updates; the package's scripts use 0.25.
    quant: Whether bases are quantised.
    quant_group_size: Entries that share a scale and a zero point; the scripts use 256.
    quant_n_bit: Bits of a code; the scripts use 4.
    cos_threshold: See above.
    gamma_proj: See above.
    queue_size: See above.
    proj_type: `'std'`, as no other works in the package.
    targets: Leaves of the package's low-rank group, as in `project`; `default_targets` if None.
      Other leaves get its plain AdamW.
    backend: Whose 8-bit kernel, see `adamw8bit`.

  Returns:
    A transform that needs `params` if `weight_decay` is not 0.

  Raises:
    ValueError: if a group does not divide a basis, as `adamw8bit`, and as `project`.
  """
  check_bitsandbytes(amsgrad, optim_bits, args, is_paged, percentile_clipping, block_wise)
  only_default('proj_type', proj_type, 'std', 'the package projects the shorter side alone')
  ranks, targets = _rank(rank), default_targets if targets is None else targets

  def is_projected(params):
    plans = plan_leaves(params, ranks, 'short', targets)
    return jax.tree.unflatten(jax.tree.structure(params), [plan.projected for plan in plans])

  is_other = lambda params: jax.tree.map(lambda x: not x, is_projected(params))
  return optax.chain(
    project(
      scale_by_adam8bit(betas, eps, min_8bit_size, backend=backend),
      rank=ranks,
      refresh_every=update_proj_gap,
      basis=svd(),
      scale=scale,
      stagger=False,
      targets=targets,
      storage=_affine(quant_n_bit, quant_group_size) if quant else None,
      interval=_queued(cos_threshold, gamma_proj, queue_size),
    ),
    optax.add_decayed_weights(weight_decay, is_other),
    optax.scale_by_learning_rate(lr),
    optax.masked(decay_updated(lr, weight_decay), is_projected),
  )


def _rank(rank):
  return lambda path, leaf: min(rank, *leaf.shape[-2:])


def _affine(bits, group) -> Storage:
  """Keeps what a basis becomes by the package's quantiser, as f32."""

  def pack(basis, axis):
    del axis
    official = basis.mT  # A Flax kernel [in, out] is the package's weight transposed.
    rows = official
    if group > 0:
      if official.shape[-2] * official.shape[-1] % group:
        raise ValueError(
          f'quant_group_size={group} does not divide a basis of shape {official.shape[-2:]}'
        )
      rows = official.reshape(*official.shape[:-2], -1, group)
    least, largest = (f(rows, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    top = 2**bits - 1
    scales = jnp.maximum(largest - least, 1e-5) / top
    zeros = jnp.clip(-jnp.round(least / scales), 0, top)
    codes = jnp.clip(jnp.round(rows / scales) + zeros, 0, top)
    return ((scales * (codes - zeros)).reshape(official.shape).mT,)

  return Storage(pack)


class QueuedState(NamedTuple):
  """When the package refreshes; leaves without a basis have `optax.MaskedNode()`."""

  gap: optax.Updates  # i32[...], updates between two bases.
  queue: optax.Updates  # f32[..., k], cosines, oldest first; below -1 where there is none yet.
  vector: optax.Updates  # f32[..., m] or [..., n], leading singular vector at the last refresh.


def _queued(threshold, growth, size) -> Interval:
  none = -2.0 * size  # Keeps the mean below -1.

  def init(leaf, plan, refresh_every):
    *units, m, n = leaf.shape
    return (
      jnp.full(units, refresh_every, jnp.int32),
      jnp.full((*units, size), none),
      jnp.zeros((*units, m if plan.left else n)),
    )

  def due(clock, held):
    gap, _, _ = held
    waiting = clock.count % gap != 0
    return 0, jnp.sum(~waiting), jnp.argsort(waiting, stable=True)

  def after(clock, unit, held, old, new):
    del unit, old
    gap, queue, vector = held
    leading = new[:, 0].astype(vector.dtype)
    norms = jnp.linalg.norm(vector) * jnp.linalg.norm(leading)
    cosine = vector @ leading / jnp.maximum(norms, 1e-8)
    queue = jnp.where(clock.count == 0, queue, jnp.append(queue[1:], cosine))
    grown = jnp.where(jnp.mean(queue) >= threshold, (gap * growth).astype(jnp.int32), gap)
    return grown, queue, leading

  return Interval(init, due, after, QueuedState)
