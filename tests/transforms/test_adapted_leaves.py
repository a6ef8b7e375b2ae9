"""What optimizers make of adapted matrices: factors are matrices, what is beside them is not."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

from memjax import adapters, optimizers, transforms
from memjax.naming import path_string
from memjax.optimizers.masks import decays
from memjax.transforms import units

ARGUMENTS = {'rank': 4, 'random_after': 10, 'head_dim': 64}
# Bytes of state of a second factor [8, 8, 512], 8 layers of rank 8; others keep whole moments.
NUMBERS = 8 * 8 * 512
FACTORED = 4 * 8 * (8 + 512)
BYTES = {
  'adalomo': FACTORED,
  'sm3': FACTORED,
  'came': 4 * NUMBERS + 2 * FACTORED,
  'adafactor': 4 * NUMBERS,  # Rank 8 is below its `min_dim_size_to_factor`.
  'adam_mini': 4 * (NUMBERS + 8 * 8),  # A head is 64 columns.
  'adamw8bit': 2 * (NUMBERS + NUMBERS // 64),
  'lion8bit': NUMBERS + NUMBERS // 64,
  'adam4bit': 2 * (NUMBERS // 2 + NUMBERS // 32),
  'lion': 4 * NUMBERS,
  'muon': 4 * NUMBERS,
  'sgd': 0,
}


@functools.cache
def trained(kind):
  """Shapes of what is trained of two kernels."""
  spec = {'lora': adapters.LoRA, 'dora': adapters.DoRA, 'sora': adapters.SoRA}[kind](rank=8)
  attach = lambda params: adapters.trainable(adapters.attach(params, spec, jax.random.key(0)))
  kernel = lambda *shape: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  layers = {'attn': {'q': kernel(8, 512, 512)}, 'mlp': {'gate': kernel(8, 512, 1376)}}
  return jax.eval_shape(attach, {'blocks': layers})


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_the_second_factor_has_the_state_of_a_matrix(name):
  make = optimizers.OPTIMIZERS[name]
  known = inspect.signature(make).parameters
  optimizer = make(1e-3, **{k: v for k, v in ARGUMENTS.items() if k in known})
  state = jax.tree.leaves_with_path(jax.eval_shape(optimizer.init, trained('lora')))
  of_factor = [x for path, x in state if path_string(path).endswith('attn/q/kernel/b')]
  if name in BYTES:
    assert sum(x.size * x.dtype.itemsize for x in of_factor) == BYTES[name]
  if name in ('apollo', 'apollo_mini', 'fira'):
    assert (8,) in {x.shape for x in of_factor}  # The limited norm.


@pytest.mark.parametrize('kind', ['lora', 'dora', 'sora'])
def test_factors_are_matrices_and_vectors_beside_them_are_not(kind):
  is_vector = {'a': False, 'b': False, 'magnitude': True, 'gate': True}
  masks = decays(trained(kind)), optimizers.is_target(trained(kind))
  for path, x in jax.tree.leaves_with_path(trained(kind)):
    path = path_string(path)
    last = path.split('/')[-1]
    assert units.is_matrix(path, x) != is_vector[last]
    assert transforms.default_targets(path, x) != is_vector[last]
  for mask in masks:
    leaves = jax.tree.leaves_with_path(mask)
    assert all(leaf != is_vector[path_string(path).split('/')[-1]] for path, leaf in leaves)


def test_a_bias_that_is_called_b_is_a_vector_and_a_factor_of_an_embedding_is_none():
  assert units.is_matrix('embed/embedding/b', jax.ShapeDtypeStruct((4, 8), jnp.float32))
  assert not units.is_matrix('blocks/mlp/b', jax.ShapeDtypeStruct((3, 8), jnp.float32))
