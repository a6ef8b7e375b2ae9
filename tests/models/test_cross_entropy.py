"""The chunked loss: the naive one's value and gradient, without the naive one's logits."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import assert_trees_close, batch_of, make, random_params

from memjax import sharding
from memjax.models.cross_entropy import chunked_cross_entropy
from memjax.models.layout import sum_over_batch

VOCAB, HIDDEN = 96, 16


def inputs(rows, length, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  head = jax.random.normal(keys[0], (HIDDEN, VOCAB), dtype)
  x = jax.random.normal(keys[1], (rows, length, HIDDEN), dtype)
  targets = jax.random.randint(keys[2], (rows, length), 0, VOCAB)
  weights = jax.random.bernoulli(keys[3], 0.7, (rows, length)).astype(jnp.float32)
  return head, x, targets, weights


def naive(head, x, targets, weights):
  logits = jnp.einsum('btd,dv->btv', x, head).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)), jnp.sum(weights)


def chunked(head, x, targets, weights, chunk=4):
  project = lambda x: jnp.einsum('btd,dv->btv', x, head)
  return chunked_cross_entropy(project, x, targets, weights, chunk)


def largest_f32(compiled, needle):
  """Elements of the largest f32 buffer of a compiled program whose shape contains `needle`."""
  shapes = re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  shapes = [tuple(map(int, shape.split(','))) for shape in shapes]
  return max(math.prod(shape) for shape in shapes if needle in shape)


@pytest.mark.parametrize(('length', 'chunk'), [(16, 4), (13, 4), (7, 1), (5, 100), (2, 2), (1, 4)])
def test_value_and_gradient_equal_the_naive_loss(length, chunk):
  args = inputs(2, length)
  run = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*args)
  (total, count), grads = run(lambda *args: chunked(*args, chunk=chunk))
  (expected, expected_count), expected_grads = run(naive)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert count == expected_count
  for grad, reference in zip(grads, expected_grads):
    np.testing.assert_allclose(grad, reference, rtol=0, atol=1e-6 * np.abs(reference).max())


def test_uncounted_targets_may_be_anything():
  head, x, targets, weights = inputs(2, 6)
  ignored = jnp.where(weights == 0, -100, targets)
  np.testing.assert_array_equal(
    chunked(head, x, ignored, weights)[0], chunked(head, x, targets, weights)[0]
  )


def test_16_bit_states_give_an_f32_loss():
  args = inputs(2, 16, jnp.bfloat16)
  total, count = chunked(*args)
  assert total.dtype == count.dtype == jnp.float32
  # Both round logits to bfloat16; only the order of the f32 sum differs.
  np.testing.assert_allclose(total, naive(*args)[0], rtol=1e-6)


@pytest.mark.parametrize('differentiate', [False, True])
def test_compiled_program_never_holds_all_logits(differentiate):
  rows, length, chunk = 2, 32, 4
  args = inputs(rows, length)

  def largest(f):
    f = jax.grad(f, argnums=(0, 1), has_aux=True) if differentiate else f
    return largest_f32(jax.jit(f).lower(*args).compile(), needle=VOCAB)

  head = HIDDEN * VOCAB
  assert largest(chunked) <= max(rows * chunk * VOCAB, head)
  # The same reading catches the naive loss, and a chunk too large to be one is cut in two.
  assert largest(naive) == rows * length * VOCAB
  assert largest(lambda *args: chunked(*args, chunk=length)) <= rows * length // 2 * VOCAB


MESHES = {'fsdp': (1, 8, 1), 'data_fsdp': (2, 4, 1), 'all': (2, 2, 2)}


ROWS, LENGTH = 16, 24


@pytest.fixture(scope='module')
def unsharded():
  # Sizes that differ from each other, so that a shape in a compiled program says what it is.
  model = make(vocab=VOCAB, intermediate=40, loss_chunk=8)
  params, batch = random_params(model), batch_of(model, (ROWS, LENGTH))
  return model, params, batch, jax.jit(value_and_grad(model))(params, batch)


@pytest.mark.parametrize(
  'shape',
  [
    pytest.param(shape, id=name, marks=() if name == 'fsdp' else pytest.mark.slow)
    for name, shape in MESHES.items()
  ],
)
def test_sharded_loss_moves_no_hidden_states(unsharded, shape):
  """Over 8 devices: the same numbers, no gathered batch, and the head gathered outside the loop."""
  model, params, batch, ((expected, expected_count), expected_grads) = unsharded
  mesh = jax.make_mesh(shape, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  by_batch = NamedSharding(mesh, P(('data', 'fsdp')))
  model = dataclasses.replace(model, activations=by_batch)
  layouts = jax.tree.map_with_path(
    lambda path, _: NamedSharding(mesh, rule_for(model, path)), params
  )
  params, batch = jax.device_put(params, layouts), jax.device_put(batch, by_batch)
  step = jax.jit(value_and_grad(model), out_shardings=(None, layouts))
  compiled = step.lower(params, batch).compile()

  gathers = collectives(compiled, 'all-gather')
  assert gathers  # Parameters are gathered; hidden states never beyond a device's own sequences.
  own = ROWS // (mesh.shape['data'] * mesh.shape['fsdp'])
  states = [shape for shape, _ in gathers if {LENGTH, model.hidden} <= set(shape)]
  assert all(math.prod(shape) <= own * LENGTH * model.hidden for shape in states)
  # One gather of the head a step, and none in the loop over chunks.
  kernel = (model.hidden, VOCAB // mesh.shape['tensor'])
  (head,) = [name for shape, name in gathers if shape == kernel]
  assert 'while' not in head

  (total, count), grads = compiled(params, batch)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert count == expected_count
  assert_trees_close(grads, expected_grads, 1e-5)


def value_and_grad(model):
  return jax.value_and_grad(model.loss, has_aux=True)


def rule_for(model, path):
  path = jax.tree_util.keystr(path, simple=True, separator='/')
  return next(spec for pattern, spec in model.SHARDING if re.fullmatch(pattern, path))


def collectives(compiled, kind):
  """Result shape and source of each collective of that kind in a compiled program."""
  found = re.findall(rf'= \w+\[([\d,]*)\]\S* {kind}\(.*op_name="([^"]*)"', compiled.as_text())
  return [(tuple(int(n) for n in shape.split(',') if n), name) for shape, name in found]


def test_gradients_in_16_bits_are_summed_over_some_axes_of_a_mesh():
  """On a CPU such a sum ended the process."""
  mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
  params, x = jnp.eye(4, dtype=jnp.bfloat16), jnp.arange(8, dtype=jnp.bfloat16).reshape(2, 4)
  f = lambda params, x: (jnp.sum((x @ params) ** 2, dtype=jnp.float32),)
  sharded = sum_over_batch(f, NamedSharding(mesh, P(('data', 'fsdp'))))
  found, expected = (jax.jit(jax.grad(lambda p, g=g: g(p, x)[0]))(params) for g in (sharded, f))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.astype(float), expected.astype(float))
