"""Small models, parameters and batches; drawn by numpy, which spares the compiler."""

import jax
import jax.numpy as jnp
import numpy as np

from memjax.models import create


def make(**overrides):
  return create('llama_tiny', **{'vocab': 64, 'hidden': 32, 'intermediate': 48, **overrides})


def random_params(model, seed=0):
  """Larger than at initialisation, norms included, so that every part of the model matters."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree.map_with_path(draw, model.abstract())


def batch_of(model, shape, seed=1):
  """Random tokens; sequence `i` does not count its first `i + 1`."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, model.vocab, (shape[0], shape[1] + 1), dtype=np.int32)
  weights = np.arange(shape[1])[None] > np.arange(shape[0])[:, None]
  return {
    'tokens': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.asarray(weights, jnp.float32),
  }


def assert_trees_close(a, b, tolerance):
  """Relative to the largest entry of each leaf: small entries are differences of large ones."""
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
  jax.tree.map(check, a, b)


def assert_gradients_close(a, b, tolerance):
  """Relative to the largest entry of all leaves: some gradients are zero but for rounding."""
  largest = max(float(np.abs(y).max()) for y in jax.tree.leaves(b))
  check = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)
  jax.tree.map(check, a, b)
