"""Official optimizers against values computed from their sources by hand, in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat

# (proj_type, official shape [out, in], updates) -> sum, Frobenius norm, first and last entry of the
# weight. From a NumPy f64 transcription of the official order of operations, with the largest entry
# of every singular vector made positive.
GOLDEN = {
  ('std', (3, 5), 2): (-0.00275766, 0.05363875, 0.00792405, -0.00237055),
  ('std', (3, 5), 4): (-0.00518239, 0.05407580, 0.00687654, -0.00114806),
  ('reverse_std', (3, 5), 2): (-0.00567982, 0.05324623, 0.00821552, -0.00321702),
  ('reverse_std', (3, 5), 4): (-0.00603029, 0.05349272, 0.00729099, -0.00249511),
  ('std', (5, 3), 2): (-0.00279174, 0.05800345, 0.00928145, -0.01497613),
  ('std', (5, 3), 4): (-0.00262935, 0.05796012, 0.00858525, -0.01549225),
  ('reverse_std', (5, 3), 2): (-0.00516815, 0.05761175, 0.01000481, -0.01524253),
  ('reverse_std', (5, 3), 4): (-0.00615930, 0.05764123, 0.00963184, -0.01546522),
}


def _gradient(shape, step):
  i, j = np.indices(shape)
  return np.sin(1 + i + 2 * j + 3 * step) + 0.1 * np.cos(5 * i * j + step)


def _weight(shape):
  i, j = np.indices(shape)
  return 0.02 * np.cos(1 + 2 * i + 3 * j)


def _run(optimizer, shape, steps):
  """Returns the official weight after some updates."""
  # A Flax kernel is the official weight transposed, and so is its gradient.
  params = {'kernel': jnp.asarray(_weight(shape).T)}
  state = optimizer.init(params)
  for step in range(steps):
    gradient = {'kernel': jnp.asarray(_gradient(shape, step).T)}
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return np.asarray(params['kernel']).T


@pytest.mark.parametrize(('proj_type', 'shape', 'steps'), GOLDEN)
def test_galore_adamw_gives_the_golden_values(proj_type, shape, steps):
  with jax.enable_x64(True):
    optimizer = compat.galore_adamw(
      lr=0.01,
      weight_decay=0.1,
      rank=2,
      update_proj_gap=2,
      scale=0.25,
      proj_type=proj_type,
    )
    weight = _run(optimizer, shape, steps)
  measured = weight.sum(), np.linalg.norm(weight), weight[0, 0], weight[-1, -1]
  # Half a unit of the last printed digit.
  np.testing.assert_allclose(measured, GOLDEN[proj_type, shape, steps], rtol=0, atol=0.6e-8)


# (method, official shape [out, in], updates), likewise, from the sources of fira and apollo-torch.
GOLDEN_FULL_RANK = {
  ('fira', (3, 5), 2): (-0.01082804, 0.06049356, 0.00120994, 0.00587760),
  ('fira', (3, 5), 4): (-0.01666269, 0.06223230, -0.00035731, 0.00777322),
  ('fira', (5, 3), 2): (-0.00748546, 0.06294276, 0.00206427, -0.01748660),
  ('fira', (5, 3), 4): (-0.00655123, 0.06454518, 0.00133919, -0.01862561),
  ('apollo', (3, 5), 4): (-0.01322594, 0.06564629, 0.00036202, 0.00331939),
  ('apollo', (5, 3), 4): (-0.00537024, 0.06612414, 0.00093397, -0.01813724),
  ('mini', (3, 5), 4): (-0.08937939, 0.23622667, -0.06749092, 0.08306827),
  ('mini', (5, 3), 4): (-0.03036779, 0.23691004, -0.06883719, -0.04058315),
}


def _projection(path, shape, refresh):
  """The projection that the golden values of APOLLO were computed with."""
  i, j = np.indices(shape)
  return jnp.sin(1.0 + i + 2 * j) / np.sqrt(min(shape))


@pytest.mark.parametrize(('method', 'shape', 'steps'), GOLDEN_FULL_RANK)
def test_full_rank_methods_give_the_golden_values(method, shape, steps):
  with jax.enable_x64(True):
    optimizer = {
      'fira': lambda: compat.fira_adamw(lr=0.01, rank=2, update_proj_gap=2, alpha=0.25),
      'apollo': lambda: compat.apollo_adamw(lr=0.01, rank=2, projection_fn=_projection),
      'mini': lambda: compat.apollo_adamw(
        lr=0.01, rank=1, scale=128.0, scale_type='tensor', projection_fn=_projection
      ),
    }[method]()
    weight = _run(optimizer, shape, steps)
  measured = weight.sum(), np.linalg.norm(weight), weight[0, 0], weight[-1, -1]
  # Half a unit of the last printed digit, and the 1e-8 in the package's denominators.
  np.testing.assert_allclose(measured, GOLDEN_FULL_RANK[method, shape, steps], rtol=0, atol=1e-8)


def test_scheduled_rate_drives_the_step_and_the_decay():
  schedule = lambda count: jnp.where(count == 0, 0.0, 0.5)
  optimizer = compat.galore_adamw(lr=schedule, weight_decay=0.1, rank=2, targets='kernel')
  params = {'kernel': jnp.asarray(_weight((4, 3)), jnp.float32)}
  state = optimizer.init(params)
  gradient = {'kernel': jnp.asarray(_gradient((4, 3), 0), jnp.float32)}
  updates, state = optimizer.update(gradient, state, params)
  np.testing.assert_array_equal(updates['kernel'], 0)
  plain = compat.galore_adamw(lr=0.5, rank=2, targets='kernel')
  step, _ = plain.update(gradient, (state[0], *plain.init(params)[1:]), params)
  updates, _ = optimizer.update(gradient, state, params)
  expected = step['kernel'] - 0.05 * (params['kernel'] + step['kernel'])
  np.testing.assert_allclose(updates['kernel'], expected, rtol=1e-6, atol=1e-7)


def test_decay_without_params_names_the_remedy():
  optimizer = compat.galore_adamw(rank=2, weight_decay=0.1)
  params = {'kernel': jnp.ones((4, 4))}
  with pytest.raises(ValueError, match=r'update\(updates, state, params\)'):
    optimizer.update(params, optimizer.init(params))


def test_unknown_projection_is_refused():
  with pytest.raises(ValueError, match='reverse_std'):
    compat.galore_adamw(rank=2, proj_type='continuous')
