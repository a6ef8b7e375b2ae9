"""Official optimizers against values computed from their sources by hand, and as transforms."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat
from memjax.compat import bitsandbytes, flat_blocks

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
  i, j = np.indices(shape[-2:])
  return jnp.broadcast_to(jnp.sin(1.0 + i + 2 * j) / np.sqrt(min(shape[-2:])), shape)


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


# (method, official shape [out, in]) -> what the limit divides the second to the fourth update by.
LIMITER = {
  ('apollo', (3, 5)): (1.0, 2.036638, 2.018001),
  ('apollo', (5, 3)): (1.0, 4.413560, 1.829935),
  ('mini', (3, 5)): (1.0, 1.664403, 1.799174),
  ('mini', (5, 3)): (1.0, 3.023245, 1.181587),
}


@pytest.mark.parametrize(('method', 'shape'), LIMITER)
def test_growing_norms_are_limited_as_by_apollo(method, shape):
  arguments = {'rank': 1, 'scale_type': 'tensor'} if method == 'mini' else {'rank': 2}
  with jax.enable_x64(True):
    limited, free = (
      compat.apollo_adamw(disable_nl=alone, projection_fn=_projection, **arguments)
      for alone in (False, True)
    )
    params = {'kernel': jnp.asarray(_weight(shape).T)}
    states, norms = [limited.init(params), free.init(params)], []
    for step in range(4):
      gradient = {'kernel': jnp.asarray(_gradient(shape, step).T)}
      made = [each.update(gradient, s, params) for each, s in zip((limited, free), states)]
      states = [state for _, state in made]
      norms.append([np.linalg.norm(updates['kernel']) for updates, _ in made])
  ratios = np.divide(*np.transpose(norms)[::-1])
  # Half a unit of the last printed digit, and the 1e-8 in the package's denominators.
  np.testing.assert_allclose(ratios[1:], LIMITER[method, shape], rtol=0, atol=1e-6)


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


# What each needs beside its defaults.
LOW_RANK = {'rank': 4, 'update_proj_gap': 1}
OPTIMIZERS = {
  'adafactor': {'weight_decay': 0.1},
  'adalomo': {'weight_decay': 0.1},
  'adam_mini': {'dim': 48, 'n_heads': 4, 'weight_decay': 0.1},
  'adamw8bit': {},
  'adamw8bit_ao': {},
  'apollo_adamw': {**LOW_RANK, 'projection_fn': _projection},
  'came': {'lr': 1e-3, 'weight_decay': 0.1},
  'fira_adamw': LOW_RANK,
  'galore_adafactor': {**LOW_RANK, 'weight_decay': 0.1},
  'galore_adamw': {**LOW_RANK, 'weight_decay': 0.1},
  'galore_adamw8bit': {**LOW_RANK, 'min_8bit_size': 256},
  'lomo': {'weight_decay': 0.1},
  'q_galore_adamw8bit': {**LOW_RANK, 'min_8bit_size': 256, 'quant': True},
}


def test_every_optimizer_is_among_them():
  others = {'colm', 'relora', 'sora_threshold'}
  assert set(compat.__all__) == {*OPTIMIZERS, *others}


def _layers(seed, dtype=jnp.float32):
  """A stack of two layers and, beside it, each of them alone; of very different scale."""
  rng = np.random.default_rng(seed)
  # 8-bit packages keep vectors of 2048 numbers in f32, and would not two of them together.
  shapes = {'attn': {'q': {'kernel': (48, 96)}}, 'norm': {'scale': (2048,)}}
  draw = lambda shape: jnp.asarray(np.stack([x * rng.standard_normal(shape) for x in (1e-3, 1)]))
  stack = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
  first, second = (jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2))
  return jax.tree.map(lambda x: x.astype(dtype), {'stack': stack, '0': first, '1': second})


SLOW = ('galore_adafactor', 'galore_adamw8bit', 'q_galore_adamw8bit')


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in OPTIMIZERS]
)
def test_a_stack_is_updated_as_its_layers_would_be(name):
  optimizer = getattr(compat, name)(**OPTIMIZERS[name])
  params = _layers(0)

  @jax.jit
  def update(gradient, state):
    return optimizer.update(gradient, state, params)

  state = optimizer.init(params)
  for step in range(1, 3):
    updates, state = update(_layers(step), state)
  for i in range(2):
    stacked = jax.tree.map(lambda x, i=i: x[i], updates['stack'])
    for found, expected in zip(jax.tree.leaves(stacked), jax.tree.leaves(updates[str(i)])):
      # f32 rounding, over the scale of a leaf; and a code of 8 bits may tie the other way.
      off = np.abs(found - expected) > 1e-4 * np.max(np.abs(expected))
      assert np.any(expected != 0)
      assert np.mean(off) < 1e-3


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_have_the_dtype_of_the_weights_and_states_their_own(name, dtype):
  optimizer = getattr(compat, name)(**OPTIMIZERS[name])
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  params = jax.eval_shape(lambda: _layers(0, dtype))
  state = jax.eval_shape(optimizer.init, params)
  updates, after = jax.eval_shape(optimizer.update, params, state, params)
  assert described(updates) == described(params)
  assert described(after) == described(state)


ADAMW = 'lr betas eps weight_decay correct_bias'
BITSANDBYTES = 'lr betas eps weight_decay amsgrad optim_bits args min_8bit_size'
ADAFACTOR = (
  'lr eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init'
)
# Arguments of the official classes in their order; after a bar, those by keyword alone.
OFFICIAL = {
  'adafactor': ADAFACTOR,
  'adalomo': 'lr loss_scale eps clip_threshold decay_rate clip_grad_norm clip_grad_value '
  'weight_decay',
  'adam_mini': 'lr betas eps weight_decay | model_sharding dim n_heads n_kv_heads verbose',
  'adamw8bit': f'{BITSANDBYTES} is_paged',
  'adamw8bit_ao': 'lr betas eps weight_decay amsgrad | block_size bf16_stochastic_round',
  'apollo_adamw': f'{ADAMW} scale_front disable_nl no_deprecation_warning | rank proj scale_type '
  'scale update_proj_gap proj_type',
  'came': 'lr eps clip_threshold betas weight_decay',
  'fira_adamw': f'{ADAMW} no_deprecation_warning | rank update_proj_gap alpha proj_type',
  'galore_adafactor': f'{ADAFACTOR} | rank update_proj_gap scale proj_type',
  'galore_adamw': f'{ADAMW} no_deprecation_warning | rank update_proj_gap scale proj_type',
  'galore_adamw8bit': f'{BITSANDBYTES} percentile_clipping block_wise is_paged | rank '
  'update_proj_gap scale proj_type',
  'lomo': 'lr clip_grad_norm clip_grad_value weight_decay loss_scale_args',
  'q_galore_adamw8bit': f'{BITSANDBYTES} percentile_clipping block_wise is_paged | rank '
  'update_proj_gap scale proj_type quant quant_group_size quant_n_bit cos_threshold gamma_proj '
  'queue_size',
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_official_call_can_be_pasted(name):
  positional, _, keywords = OFFICIAL[name].partition('|')
  parameters = inspect.signature(getattr(compat, name)).parameters.values()
  kinds = lambda kind: [p.name for p in parameters if p.kind is kind]
  assert kinds(inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional.split()
  assert set(keywords.split()) <= set(kinds(inspect.Parameter.KEYWORD_ONLY))


@pytest.mark.parametrize(
  ('name', 'argument', 'value'),
  [
    ('adamw8bit', 'amsgrad', True),
    ('adamw8bit', 'optim_bits', 8),
    ('adamw8bit', 'is_paged', True),
    ('galore_adamw8bit', 'percentile_clipping', 5),
    ('q_galore_adamw8bit', 'block_wise', False),
    ('q_galore_adamw8bit', 'proj_type', 'right'),
    ('adamw8bit_ao', 'bf16_stochastic_round', True),
    ('lomo', 'loss_scale_args', {'init_scale': 2.0}),
  ],
)
def test_arguments_that_are_left_out_are_refused_with_a_way_out(name, argument, value):
  with pytest.raises(ValueError, match=f'{argument}=.* is not reproduced, only {argument}='):
    getattr(compat, name)(**(OPTIMIZERS[name] | {argument: value}))


@pytest.mark.parametrize('backend', ['cuda', 'cpu'])
def test_adamw8bit_differs_by_backend_in_decay_bad_numbers_and_signs(backend):
  rng = np.random.default_rng(0)
  weight, gradient = (rng.standard_normal((64, 80)).astype(np.float32) for _ in range(2))
  gradient[0, :8] = -1e-7  # Nearest to the code of zero.
  gradient[1, 1] = np.nan if backend == 'cuda' else 1.0
  optimizer = compat.adamw8bit(lr=0.01, weight_decay=0.1, backend=backend)
  params = {'kernel': jnp.asarray(weight.T)}
  update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
  updates, state = update({'kernel': jnp.asarray(gradient.T)}, optimizer.init(params), params)

  m, v = 0.1 * gradient, 0.001 * gradient**2
  step = 0.01 * m / 0.1 / (np.sqrt(v / 0.001) + 1e-8)
  if backend == 'cuda':
    expected = np.where(np.isnan(gradient), weight, (weight - step) * (1 - 0.01 * 0.1))
  else:
    expected = weight * (1 - 0.01 * 0.1) - step
  np.testing.assert_allclose(weight + updates['kernel'].T, expected, rtol=2e-7, atol=2e-7)
  moments = [
    bitsandbytes.dequantise(each['kernel'], flat_blocks.dynamic_map(signed)).reshape(64, 80)
    for each, signed in ((state.state1, True), (state.state2, False))
  ]
  if backend == 'cuda':
    assert moments[0][1, 1] == moments[1][1, 1] == 0
    gradient[1, 1] = 0
    np.testing.assert_array_equal(np.sign(moments[0]), np.sign(gradient))
  else:
    np.testing.assert_array_equal(moments[0][0, :8], 0)
