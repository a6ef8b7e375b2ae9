"""Low-rank methods in steps that never hold a whole gradient: micro-batches, layers, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memjax import transforms
from memjax.transforms.layers import Layer
from tests import hlo

RANK, EVERY = 4, 3
SHAPES = {'blocks': {'q': (3, 8, 12), 'down': (3, 12, 8)}, 'bias': (5,)}


def _gradients(seed):
  rng = np.random.default_rng(seed)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def _mean(trees):
  return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


class TestAccumulation:
  def _optimizer(self, **options):
    options = {'basis': transforms.svd(), 'refresh_every': EVERY, 'stagger': False, **options}
    return transforms.galore(0.1, RANK, weight_decay=0.1, **options)

  def _accumulate(self, optimizer, parts, state, params):
    """One update as a training step makes it, in a scan over micro-batches."""

    def body(carry, part):
      state, total = carry
      index, grads = part
      state = transforms.refresh_subspace(optimizer, grads, state, params, when=index == 0)
      reduced = transforms.project_gradient(grads, state)
      return (state, jax.tree.map(jnp.add, total, reduced)), None

    shapes = jax.eval_shape(transforms.project_gradient, params, state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    parts = jnp.arange(len(parts)), stacked
    (state, total), _ = jax.lax.scan(body, (state, zeros), parts)
    mean = jax.tree.map(lambda x: x / len(parts[0]), total)
    return optimizer.update(mean, state, params, projected=True)

  @pytest.mark.slow
  @pytest.mark.parametrize(
    'options',
    [{'moments': 'rotate'}, {'packed': True}],
    ids=['rotate', 'packed'],
  )
  def test_only_bases_differ_from_the_update_of_the_mean_gradient(self, options):
    if options.pop('packed', False):
      make = lambda basis: optax.chain(
        transforms.scale_by_q_galore(RANK, basis=basis, refresh_every=EVERY), optax.scale(-0.1)
      )
    else:
      make = lambda basis: self._optimizer(basis=basis, **options)
    params = _gradients(99)
    optimizer = make(transforms.svd())
    accumulate = jax.jit(lambda *args: self._accumulate(optimizer, *args))
    state = optimizer.init(params)
    whole = {}
    for step in range(EVERY + 1):
      parts = [_gradients(10 * step + i) for i in range(2)]
      updates, after = accumulate(parts, state, params)
      # The reference sees the mean gradient, and finds its bases in the first part's.
      first, mean = parts[0], _mean(parts)

      def given(gradient, previous, key, count=None, first=first, mean=mean):
        del key, count
        for leaf, other in zip(jax.tree.leaves(mean['blocks']), jax.tree.leaves(first['blocks'])):
          for one, part in zip(leaf, other):
            for matrix, basis_of in ((one, part), (one.T, part.T)):
              if matrix.shape == gradient.shape and jnp.array_equal(matrix, gradient):
                return transforms.svd().refresh(basis_of, previous, None)
        raise AssertionError('the reference refreshes from another gradient')

      reference = make(transforms.Basis(given))
      with jax.disable_jit():
        expected, whole_state = reference.update(mean, whole.get('state', state), params)
      whole['state'] = whole_state
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), updates, expected)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, whole_state
      )
      state = after

  def test_what_is_accumulated_has_rank_r(self):
    optimizer, params = self._optimizer(), _gradients(0)
    reduced = jax.eval_shape(transforms.project_gradient, params, optimizer.init(params))
    shapes = jax.tree.map(lambda x: x.shape, reduced)
    assert shapes == {'blocks': {'q': (3, RANK, 12), 'down': (3, 12, RANK)}, 'bias': (5,)}

  def test_nothing_but_bases_changes_in_a_refresh_and_nothing_without_one(self):
    optimizer, params = self._optimizer(), _gradients(0)
    state = optimizer.init(params)
    kept = transforms.refresh_subspace(optimizer, _gradients(1), state, params, when=False)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    after = transforms.refresh_subspace(optimizer, _gradients(1), state, params)
    _, direct = optimizer.update(_gradients(1), state, params)
    jax.tree.map(np.testing.assert_array_equal, after[0].left, direct[0].left)
    put_back = after[0]._replace(left=state[0].left, right=state[0].right)
    jax.tree.map(np.testing.assert_array_equal, (put_back, *after[1:]), state)

  @pytest.mark.parametrize(
    ('make', 'message'),
    [
      (lambda: transforms.scale_by_apollo(RANK), 'lift'),
      (lambda: transforms.scale_by_fira(RANK), 'lift'),
      (
        lambda: transforms.project(
          optax.identity(), RANK, basis=transforms.random_projection(), targets='blocks'
        ),
        'drawn anew',
      ),
    ],
  )
  def test_methods_that_need_whole_gradients_refuse(self, make, message):
    params = _gradients(0)
    with pytest.raises(ValueError, match=message):
      make().update(params, make().init(params), params, projected=True)

  def test_state_without_a_subspace_is_refused(self):
    params = _gradients(0)
    with pytest.raises(ValueError, match='no subspace'):
      transforms.project_gradient(params, optax.adam(0.1).init(params))


# Random subspaces compile faster than iterated ones, and an exact SVD gathers the matrix.
CHEAP = dict(refresh_every=EVERY, basis=transforms.random_subspace())
METHODS = {
  'apollo': lambda: transforms.scale_by_apollo(RANK, refresh_every=EVERY),
  'fira': lambda: transforms.scale_by_fira(RANK, **CHEAP),
  'random_subspace': lambda: transforms.scale_by_galore(RANK, moments='rotate', **CHEAP),
  'q_galore': lambda: transforms.scale_by_q_galore(RANK, **CHEAP),
}


@pytest.mark.parametrize('name', ['apollo', 'random_subspace', 'q_galore'])
def test_layers_seen_one_by_one_are_updated_as_in_the_stack(name):
  transform, params = METHODS[name](), _gradients(99)
  update = jax.jit(transform.update)

  @jax.jit
  def update_layer(gradients, state, index):
    return transform.update(gradients, state, layer=Layer(index, 3, 'blocks'))

  def slice_of(tree, index):
    stacked = lambda x: x.ndim > 0 and x.shape[0] == 3
    take = lambda x: np.asarray(x)[index : index + 1] if stacked(x) else x
    return jax.tree.map(take, tree)

  state = transform.init(params)
  states = [slice_of(state, index) for index in range(3)]
  for step in range(EVERY + 2):
    gradients = _gradients(step)
    updates, state = update(gradients, state)
    for index in range(3):
      own, states[index] = update_layer(slice_of(gradients, index), states[index], jnp.int32(index))
      for a, b in zip(*map(jax.tree.leaves, (own, slice_of(updates, index)))):
        np.testing.assert_allclose(a, b, atol=1e-5)
      for a, b in zip(*map(jax.tree.leaves, (states[index], slice_of(state, index)))):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', METHODS)
def test_no_collective_carries_a_matrix(name):
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  layers, m, n = 3, 32, 64
  transform = METHODS[name]()

  def sharding(x):
    if x.ndim < 3:
      return NamedSharding(mesh, PartitionSpec())
    whole = [axis if size in (m, n) else None for axis, size in zip(mesh.axis_names, x.shape[1:])]
    return NamedSharding(mesh, PartitionSpec(None, *whole))

  params = {'w': jnp.zeros((layers, m, n))}
  state = jax.eval_shape(transform.init, params)
  shardings = jax.tree.map(sharding, (params, state))
  step = jax.jit(transform.update, in_shardings=shardings, out_shardings=shardings)
  moved = hlo.collectives(step.lower(params, state).compile().as_text())
  assert moved
  # The projected gradient of all layers is the largest.
  assert max(map(hlo.elements, moved)) <= layers * RANK * n < m * n
