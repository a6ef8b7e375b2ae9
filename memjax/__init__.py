"""memjax: train and fine-tune language models in a fraction of the usual memory.

Every method is an `optax.GradientTransformation` that works alone, in a chain, in a notebook, on
any pytree of arrays:

>>> import jax.numpy as jnp, optax, memjax
>>> params = {'dense': {'kernel': jnp.ones((64, 256))}}
>>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), memjax.galore(1e-2, rank=4))
>>> state = optimizer.init(params)
>>> updates, state = optimizer.update({'dense': {'kernel': jnp.ones((64, 256))}}, state, params)
>>> params = memjax.apply_updates(params, updates)

The submodules `data`, `models`, `train` and the rest are imported when they are first named, so
that `import memjax` loads JAX and optax and nothing heavier.
"""

import importlib

from memjax.transforms import (
  adafactor,
  adalomo,
  adam_mini,
  apollo,
  apollo_mini,
  apply_updates,
  came,
  default_targets,
  fira,
  galore,
  galore_adafactor,
  golore,
  lazy,
  limit_norm_growth,
  muon,
  packed,
  project,
  project_gradient,
  q_galore,
  quantize_state,
  random_projection,
  refresh_subspace,
  relative_step,
  round_state,
  scale_by_adafactor,
  scale_by_adalomo,
  scale_by_adam_mini,
  scale_by_apollo,
  scale_by_apollo_mini,
  scale_by_came,
  scale_by_fira,
  scale_by_galore,
  scale_by_golore,
  scale_by_muon,
  scale_by_parameter_rms,
  scale_by_q_galore,
  scale_by_sm3,
  sm3,
  subspace_iteration,
  svd,
  transformer_blocks,
)
from memjax.version import __version__

_SUBMODULES = (
  'build',
  'checkpoint',
  'compat',
  'config',
  'data',
  'evaluate',
  'metrics',
  'models',
  'optimizers',
  'plan',
  'schedules',
  'sharding',
  'steps',
  'train',
  'transforms',
  'weights',
)

__all__ = [
  '__version__',
  'adafactor',
  'adalomo',
  'adam_mini',
  'apollo',
  'apollo_mini',
  'apply_updates',
  'came',
  'default_targets',
  'fira',
  'galore',
  'galore_adafactor',
  'golore',
  'lazy',
  'limit_norm_growth',
  'muon',
  'packed',
  'project',
  'project_gradient',
  'q_galore',
  'quantize_state',
  'random_projection',
  'refresh_subspace',
  'relative_step',
  'round_state',
  'scale_by_adafactor',
  'scale_by_adalomo',
  'scale_by_adam_mini',
  'scale_by_apollo',
  'scale_by_apollo_mini',
  'scale_by_came',
  'scale_by_fira',
  'scale_by_galore',
  'scale_by_golore',
  'scale_by_muon',
  'scale_by_parameter_rms',
  'scale_by_q_galore',
  'scale_by_sm3',
  'sm3',
  'subspace_iteration',
  'svd',
  'transformer_blocks',
  *_SUBMODULES,
]


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f'memjax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted(__all__)
