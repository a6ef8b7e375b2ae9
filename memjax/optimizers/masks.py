"""Which leaves an option applies to, as masks for optax."""

import re

import jax

from memjax import transforms
from memjax.naming import path_string


def decays(params):
  """Which leaves weight decay shrinks: not norms, biases and other vectors."""

  def decide(path, leaf):
    name = path_string(path)
    return leaf.ndim > 1 and not re.search('norm|bias|scale', name)

  return jax.tree_util.tree_map_with_path(decide, params)


def is_target(params):
  """Which leaves low-rank methods project by default: the layers' matrices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: transforms.default_targets(path_string(path), leaf), params
  )
