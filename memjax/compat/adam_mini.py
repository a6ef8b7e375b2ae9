"""`adam-mini` 1.1.1 (zyushun/Adam-mini)."""

import re
from collections.abc import Callable

import optax

from memjax import transforms
from memjax.transforms import units

_BIAS = ('bias',)
_QUERY_KEY = ('k_proj', 'q_proj', 'wq', 'wk', 'query', 'key')
_BY_ROW = (
  *('embed', 'embd', 'wte', 'lm_head', 'output', 'final_layer', 'v_proj', 'wv', 'value'),
  *('o_proj', 'wo', 'attn.proj', 'feed_forward', 'linear', 'mlp'),
)
_NO_DECAY = ('norm', 'ln', 'bias')

# Paths of memjax's own models, as the names that the package looks for.
_NAMES = (
  (re.compile(r'(^|\.)attn\.([qkvo])\.'), r'\1attn.\2_proj.'),
  (re.compile(r'(^|\.)head\.'), r'\1lm_head.'),
)


def default_name(path: str) -> str:
  """The parameter name that the package would see.

  >>> default_name('blocks/attn/q/kernel'), default_name('head/kernel')
  ('blocks.attn.q_proj.kernel', 'lm_head.kernel')
  """
  name = path.replace('/', '.').lower()
  for pattern, replacement in _NAMES:
    name = pattern.sub(replacement, name)
  return name


def adam_mini(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  *,
  model_sharding: bool | None = None,
  dim: int = 2048,
  n_heads: int = 32,
  n_kv_heads: int | None = None,
  verbose: bool = True,
  name: Callable[[str], str] = default_name,
) -> optax.GradientTransformationExtraArgs:
  """`adam_mini.Adam_mini` 1.1.1, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - Blocks go by parts of lower-case names, first match first: `bias` by number, queries and keys
      by head, embeddings by token, the other known matrices by output neuron, and a leaf of any
      other name, be it a matrix, is one block.
    - A head is `dim * dim / n_heads` numbers whatever the kernel's shape; `n_kv_heads` must divide
      `n_heads` and is not used otherwise.
    - Names with `norm`, `ln` or `bias` do not decay.
    - `eps` is added to the root, where the paper has it inside.

  Left out:
    - Heads that are no whole number of columns, which the package cuts across.
    - One block for the norms of all layers, if they are stacked: here it is one a layer.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: See above.
    weight_decay: Decoupled decay.
    model_sharding: Changes nothing, as in the package.
    dim: Width of the model.
    n_heads: Attention heads.
    n_kv_heads: See above.
    verbose: Changes nothing; what the package prints is not printed.
    name: Function of a path such as `'blocks/attn/q/kernel'` that returns the name to look at.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: for numbers of heads that do not divide; at `init`, naming the leaf, for a kernel
      that does not divide into heads.
  """
  del model_sharding, verbose
  if n_kv_heads is not None and n_heads % n_kv_heads:
    raise ValueError(f'n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}')
  head_numel = dim * dim // n_heads

  def partition(path, leaf):
    label = name(path)
    says = lambda words: any(word in label for word in words)
    ones = (1,) * leaf.ndim
    if says(_BIAS) or not leaf.ndim:
      return ones
    if not units.is_matrix(path, leaf):
      return (*ones[1:], leaf.shape[-1])
    rows, columns = leaf.shape[-2:]
    if says(_QUERY_KEY):
      width = head_numel // rows
      if head_numel % rows or columns % max(width, 1):
        raise ValueError(
          f'{path}: {rows} x {columns} does not divide into heads of dim * dim / n_heads = '
          f'{head_numel} numbers; pass the dim and n_heads of the model'
        )
      return (*ones[2:], rows, width)
    if says(('embed', 'embd', 'wte')):
      return (*ones[2:], 1, columns)
    if says(_BY_ROW):
      return (*ones[2:], rows, 1)
    return (*ones[2:], rows, columns)

  def decays(params):
    return units.map_with_path(
      lambda path, _: not any(word in name(path) for word in _NO_DECAY), params
    )

  return transforms.adam_mini(
    lr, *betas, eps=eps, partition=partition, weight_decay=weight_decay, mask=decays
  )
