"""Ready optimizers by name, with arguments that a config can hold: numbers and words.

Every factory takes `learning_rate` (a number or a schedule) and returns an
`optax.GradientTransformation` whose updates are added to the parameters; on a mesh, some take
`layout`, see `memjax.sharding.layout`. State is f32 whatever the dtype of the parameters. Notebooks
call the functions of `memjax` and `optax` themselves.
"""

import inspect
import re

import jax
import optax

from memjax import transforms
from memjax.transforms.float32 import in_float32
from memjax.transforms.paths import path_string


def adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
  """Adam with decoupled weight decay on matrices (Loshchilov and Hutter, 2019)."""
  return in_float32(optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays))


def adafactor(
  learning_rate,
  decay_rate=0.8,
  clipping_threshold=1.0,
  min_dim_size_to_factor=32,
  scale_by_parameter=True,
  weight_decay=0.0,
):
  """Adafactor as optax has it (Shazeer and Stern, 2018)."""
  inner = optax.adafactor(
    learning_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    multiply_by_parameter_scale=scale_by_parameter,
    clipping_threshold=clipping_threshold,
    weight_decay_rate=weight_decay or None,
    weight_decay_mask=decays,
  )
  return in_float32(inner)


def sgd(learning_rate, momentum=0.0):
  """Gradient descent, with momentum if it is above zero."""
  return in_float32(optax.sgd(learning_rate, momentum=momentum or None))


def galore(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=0.25,
  side='short',
  basis='subspace_iteration',
  moments='keep',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """GaLore (Zhao et al., 2024); see `memjax.galore`. `targets` is a regex on leaf paths, '' the
  published choice.
  """
  if basis not in BASES:
    raise ValueError(f'basis {basis!r} does not exist; there are {", ".join(BASES)}')
  return transforms.galore(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    scale=scale,
    side=side,
    basis=BASES[basis](),
    moments=moments,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def decays(params):
  """Which leaves weight decay shrinks: not norms, biases and other vectors."""

  def decide(path, leaf):
    name = path_string(path)
    return leaf.ndim > 1 and not re.search('norm|bias|scale', name)

  return jax.tree_util.tree_map_with_path(decide, params)


REQUIRED = inspect.Parameter.empty  # Default of an argument that has none.


def arguments(name):
  """Returns the arguments of an optimizer that a config may hold, with their defaults."""
  parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


BASES = {'subspace_iteration': transforms.subspace_iteration, 'svd': transforms.svd}

OPTIMIZERS = {'adafactor': adafactor, 'adamw': adamw, 'galore': galore, 'sgd': sgd}
