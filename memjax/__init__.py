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

from memjax.estimators.methods import forward_descent as forward_descent
from memjax.estimators.methods import lozo as lozo
from memjax.estimators.methods import lozo_m as lozo_m
from memjax.estimators.methods import mezo as mezo
from memjax.estimators.methods import mezo_adam as mezo_adam
from memjax.estimators.methods import mezo_momentum as mezo_momentum
from memjax.estimators.methods import subzero as subzero
from memjax.estimators.methods import zo_adam as zo_adam
from memjax.estimators.methods import zo_sgd_conservative as zo_sgd_conservative
from memjax.estimators.methods import zo_sgd_sign as zo_sgd_sign
from memjax.estimators.spsa import forward_gradient as forward_gradient
from memjax.estimators.spsa import spsa as spsa
from memjax.transforms import adafactor as adafactor
from memjax.transforms import adalomo as adalomo
from memjax.transforms import adam_mini as adam_mini
from memjax.transforms import apollo as apollo
from memjax.transforms import apollo_mini as apollo_mini
from memjax.transforms import apply_updates as apply_updates
from memjax.transforms import came as came
from memjax.transforms import default_targets as default_targets
from memjax.transforms import fira as fira
from memjax.transforms import galore as galore
from memjax.transforms import galore_adafactor as galore_adafactor
from memjax.transforms import golore as golore
from memjax.transforms import keep_master as keep_master
from memjax.transforms import keep_remainder as keep_remainder
from memjax.transforms import lazy as lazy
from memjax.transforms import limit_norm_growth as limit_norm_growth
from memjax.transforms import muon as muon
from memjax.transforms import packed as packed
from memjax.transforms import project as project
from memjax.transforms import project_gradient as project_gradient
from memjax.transforms import q_galore as q_galore
from memjax.transforms import quantize_state as quantize_state
from memjax.transforms import random_projection as random_projection
from memjax.transforms import refresh_subspace as refresh_subspace
from memjax.transforms import relative_step as relative_step
from memjax.transforms import round_state as round_state
from memjax.transforms import scale_by_adafactor as scale_by_adafactor
from memjax.transforms import scale_by_adalomo as scale_by_adalomo
from memjax.transforms import scale_by_adam_mini as scale_by_adam_mini
from memjax.transforms import scale_by_apollo as scale_by_apollo
from memjax.transforms import scale_by_apollo_mini as scale_by_apollo_mini
from memjax.transforms import scale_by_came as scale_by_came
from memjax.transforms import scale_by_fira as scale_by_fira
from memjax.transforms import scale_by_galore as scale_by_galore
from memjax.transforms import scale_by_galore_adafactor as scale_by_galore_adafactor
from memjax.transforms import scale_by_golore as scale_by_golore
from memjax.transforms import scale_by_muon as scale_by_muon
from memjax.transforms import scale_by_parameter_rms as scale_by_parameter_rms
from memjax.transforms import scale_by_q_galore as scale_by_q_galore
from memjax.transforms import scale_by_sm3 as scale_by_sm3
from memjax.transforms import scale_by_vector_adam as scale_by_vector_adam
from memjax.transforms import sm3 as sm3
from memjax.transforms import subspace_iteration as subspace_iteration
from memjax.transforms import svd as svd
from memjax.transforms import transformer_blocks as transformer_blocks
from memjax.transforms import vector_adam as vector_adam
from memjax.version import __version__ as __version__

_SUBMODULES = (
  'adapters',
  'build',
  'checkpoint',
  'compat',
  'config',
  'data',
  'estimators',
  'evaluate',
  'metrics',
  'models',
  'optimizers',
  'plan',
  'schedules',
  'sharding',
  'steps',
  'tasks',
  'train',
  'transforms',
  'weights',
)
_FUNCTIONS = {  # Name -> submodule that holds it.
  'adam4bit': 'optimizers',
  'adamw8bit': 'optimizers',
  'apollo_mini8bit': 'optimizers',
  'galore8bit': 'optimizers',
  'lion': 'optimizers',
  'lion8bit': 'optimizers',
  'plan_step': 'plan',
  'q_galore8bit': 'optimizers',
  'replay': 'steps.replay',
  'replay_run': 'from_log',
}


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f'memjax.{name}')
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(f'memjax.{_FUNCTIONS[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *_SUBMODULES, *_FUNCTIONS})
