"""Which leaves an option applies to, as masks for optax."""

from memjax import transforms
from memjax.transforms import units


def decays(params):
  """Which leaves weight decay shrinks: not norms, biases and other vectors."""
  return units.map_with_path(units.is_matrix, params)


def is_target(params):
  """Which leaves low-rank methods project by default: the layers' matrices."""
  return units.map_with_path(transforms.default_targets, params)
