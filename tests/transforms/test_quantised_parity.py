"""Low-bit optimizers beside the official PyTorch ones, on the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat
from memjax.compat import bitsandbytes as ours_bnb
from memjax.compat import flat_blocks
from memjax.compat import torchao as ours_ao

pytestmark = pytest.mark.parity

STEPS = 24
SHAPES = {
  'wide': (64, 80),
  'tall': (96, 64),
  'square': (72, 72),
  'ragged': (67, 71),
  'small': (9, 7),
}


@pytest.fixture
def bnb(torch, monkeypatch):
  """bitsandbytes, rounding by its PyTorch reference: its CPU kernel's look-up table does not."""
  bnb = pytest.importorskip('bitsandbytes')
  from bitsandbytes.backends.cpu import ops

  def quantise(x, table, scales, codes, block):
    for out, made in zip((codes, scales), reference_quantise(torch, x, table, block)):
      out.copy_(made)

  monkeypatch.setattr(ops, '_quant_blockwise_fp32_direct', quantise)
  return bnb


def reference_quantise(torch, x, table, block=256):
  """Codes and scales by the package's PyTorch reference, which its CPU kernel stands before."""
  key = torch._C.DispatchKey.CompositeExplicitAutograd
  return torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(key, x, table, block)


def gradients(shape):
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    yield (rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 0, shape)).astype(np.float32)


def first(shape):
  return (0.02 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


def run_ours(optimizer, shape, made=gradients, adopt=None, dtype='float32'):
  """Yields the weights [out, in] after each update of a kernel [in, out].

  With `adopt` each update starts from what it returns, the official weight and state: a number
  within f32 rounding of a midpoint ties either way, and would go its own way from then on.
  """
  params = {'kernel': jnp.asarray(first(shape).T, dtype)}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for gradient in made(shape):
    updates, state = update({'kernel': jnp.asarray(gradient.T, dtype)}, state, params)
    params = optax.apply_updates(params, updates)
    yield np.asarray(params['kernel'].T), state
    if adopt is not None:
      params, state = adopt(state)


def drifting(shape):
  """Gradients whose singular values are far apart, so that no basis is degenerate."""
  rng = np.random.default_rng(0)
  rank = min(shape)
  left = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
  right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
  for _ in range(STEPS):
    left = np.linalg.qr(left + 0.1 * rng.standard_normal(left.shape))[0]
    right = np.linalg.qr(right + 0.1 * rng.standard_normal(right.shape))[0]
    yield ((left * 0.7 ** np.arange(rank)) @ right.T).astype(np.float32)


def run_theirs(torch, make, shape, made=gradients):
  weight = torch.nn.Parameter(torch.tensor(first(shape)))
  optimizer = make(weight)
  for gradient in made(shape):
    weight.grad = torch.tensor(gradient)
    optimizer.step()
    yield weight.detach().numpy().copy(), optimizer.state[weight]


@pytest.mark.parametrize('signed', [True, False])
def test_maps_are_the_packages(torch, signed):
  functional = pytest.importorskip('bitsandbytes').functional
  from torchao.optim.quant_utils import create_dynamic_map

  np.testing.assert_array_equal(
    flat_blocks.dynamic_map(signed), functional.create_dynamic_map(signed).numpy()
  )
  four = np.asarray(create_dynamic_map(True, 3, 4), np.float32)
  np.testing.assert_array_equal(flat_blocks.dynamic_map(True, 3), four)


@pytest.mark.parametrize('signed', [True, False])
def test_codes_are_bitsandbytes(torch, signed):
  functional = pytest.importorskip('bitsandbytes').functional
  table = functional.create_dynamic_map(signed)
  x = next(gradients((20_011,))) * (1 if signed else 0) + abs(next(gradients((20_011,)))) * (
    not signed
  )
  x[256:512] = 0
  found = ours_bnb.quantise(jnp.asarray(x), table.numpy())
  codes, scales = reference_quantise(torch, torch.tensor(x), table)
  np.testing.assert_array_equal(found.codes, codes.numpy())
  np.testing.assert_array_equal(found.scales, scales.numpy())


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_adamw8bit_follows_bitsandbytes(torch, bnb, shape, weight_decay):
  weight = torch.nn.Parameter(torch.tensor(first(shape)))
  official = bnb.optim.AdamW8bit([weight], lr=0.01, weight_decay=weight_decay)
  ours = compat.adamw8bit(lr=0.01, weight_decay=weight_decay, backend='cpu')

  def adopt(state):
    return {'kernel': _array(weight).T}, _with_moments(state, official.state[weight])

  for gradient, (mine, state) in zip(gradients(shape), run_ours(ours, shape, adopt=adopt)):
    weight.grad = torch.tensor(gradient)
    official.step()
    np.testing.assert_allclose(mine, _array(weight), rtol=1e-6, atol=1e-6)
    _check(*zip(state[1:], _with_moments(state, official.state[weight])[1:]))


OFFICIAL_AO = {8: 'AdamW8bit', 4: 'AdamW4bit', 'fp8': 'AdamWFp8'}


@pytest.mark.parametrize('bits', OFFICIAL_AO)
@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [
    *(((64, 80), 'float32'), ((96, 64), 'float32'), ((80, 80), 'float32'), ((67, 71), 'float32')),
    *(((64, 80), 'bfloat16'), ((67, 71), 'bfloat16')),
  ],
  ids=str,
)
def test_adamw8bit_ao_follows_torchao(torch, shape, dtype, bits):
  optim = pytest.importorskip('torchao.optim')
  from torchao.optim.adam import single_param_adam

  ours = compat.adamw8bit_ao(lr=0.01, weight_decay=0.1, bits=bits)
  # An update and its sum with a bfloat16 weight are rounded one after the other, as optax has it;
  # the package rounds the sum alone. Two ulps of 2**-8.
  rtol, wide = (1e-6, torch.float32) if dtype == 'float32' else (2**-7, torch.bfloat16)
  weight = torch.tensor(first(shape)).to(wide)
  official = getattr(optim, OFFICIAL_AO[bits])([torch.nn.Parameter(weight)])
  moments = [official._new_buffer(weight, signed) for signed in (True, False)]

  def moment(i):
    if not hasattr(moments[i], 'codes'):
      return {'kernel': _array(moments[i]).T}
    codes = _array(moments[i].codes.view(torch.uint8)).reshape(-1)
    codes = codes.view(jnp.float8_e4m3fn) if bits == 'fp8' else codes
    return {'kernel': flat_blocks.Flat(codes, _array(moments[i].scale))}

  def adopt(state):
    return {'kernel': _array(weight).T}, state._replace(exp_avg=moment(0), exp_avg_sq=moment(1))

  runs = zip(gradients(shape), run_ours(ours, shape, adopt=adopt, dtype=dtype))
  for step, (gradient, (mine, state)) in enumerate(runs, 1):
    # What `step` runs, without the compiler.
    single_param_adam(
      weight, torch.tensor(gradient).to(wide), torch.tensor(float(step)), *moments, None,
      torch.tensor(0.01), 0.9, 0.999, 0.1, 1e-8, True, False,
    )  # fmt: skip
    theirs = np.float32(_array(weight))
    np.testing.assert_allclose(np.float32(mine), theirs, rtol=rtol, atol=min(rtol, 1e-4))
    _check((state.exp_avg, moment(0)), (state.exp_avg_sq, moment(1)), rtol=rtol)


def test_codes_are_torchao(torch):
  from torchao.optim.quant_utils import (
    quantize_4bit_with_qmap,
    quantize_8bit_with_qmap,
    scale_tensor,
  )

  x = next(gradients((64 * 256,)))
  for bits, quantise in ((8, quantize_8bit_with_qmap), (4, quantize_4bit_with_qmap)):
    table = flat_blocks.dynamic_map(True, 7 if bits == 8 else 3)
    scaled, scales = scale_tensor(torch.tensor(x), 128)
    codes = quantise(scaled, torch.tensor(table)).numpy()
    found = ours_ao.quantise(jnp.asarray(x), table, 128)
    expected = codes if bits == 8 else codes[::2] << 4 | codes[1::2]
    np.testing.assert_array_equal(found.codes, expected)
    np.testing.assert_array_equal(found.scales, scales.numpy())


@pytest.mark.parametrize('proj_type', ['std', 'reverse_std'])
@pytest.mark.parametrize('shape', [(64, 160), (160, 64), (128, 128)], ids=str)
@pytest.mark.parametrize('min_8bit_size', [4096, 256])
@pytest.mark.parametrize('package', ['galore_torch.adamw8bit', 'q_galore_torch.q_galore_adamw8bit'])
def test_galore_adamw8bit_follows_the_official_one(
  torch, bnb, svd_with_signs, monkeypatch, request, package, shape, proj_type, min_8bit_size
):
  from bitsandbytes.optim.optimizer import Optimizer2State

  lazy = package.startswith('q_')
  if lazy and proj_type != 'std':
    pytest.skip('the package has the short side alone')
  if lazy:
    request.getfixturevalue('bitsandbytes_049')
  official = pytest.importorskip(package).AdamW8bit

  class Official(official):
    """With the constructor that bitsandbytes 0.50 has: two arguments fewer."""

    def __init__(self, groups, lr, weight_decay):
      arguments = groups, lr, (0.9, 0.999), 1e-8, weight_decay, 8, None, min_8bit_size
      gone = (100, True) if lazy else ()
      Optimizer2State.__init__(self, 'adam', *arguments, *gone)

  monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
  group = {'rank': 16, 'update_proj_gap': 5, 'scale': 0.25}
  ours = functools.partial(compat.galore_adamw8bit, proj_type=proj_type)
  if lazy:
    queue = {'quant': False, 'cos_threshold': 0.4, 'gamma_proj': 2, 'queue_size': 3}
    group, ours = group | queue, compat.q_galore_adamw8bit
  ours = ours(
    lr=0.01, weight_decay=0.1, min_8bit_size=min_8bit_size, targets='kernel', backend='cpu', **group
  )
  group |= {'proj_type': proj_type, 'quant_group_size': -1, 'quant_n_bit': 8}
  make = lambda weight: Official([{'params': [weight], **group}], 0.01, 0.1)
  last = None

  def adopt(state):
    weight, theirs = last
    projected = state[0]._replace(inner=_with_moments(state[0].inner, theirs))
    return {'kernel': jnp.asarray(weight.T)}, (projected, *state[1:])

  runs = zip(run_ours(ours, shape, drifting, adopt), run_theirs(torch, make, shape, drifting))
  for (mine, (projected, *_)), last in runs:
    weight, theirs = last
    # A second moment whose code is zero leaves a number divided by its own gradient, and so does
    # one of 1e-12 beside others of 1e-7; the gradient there may be all rounding. In the subspace
    # one number or two of 2,560 are off: in f32 by 2e-6, where a step is 2.5e-3, in 8 bits by one.
    basis = theirs['projector'].ortho_matrix.numpy()
    off = abs((mine - weight) @ basis.T if len(basis) == 16 else basis.T @ (mine - weight))
    assert np.mean(off > 1e-6) < 1e-3
    if min_8bit_size > 256:
      assert np.max(off) < 1e-5
    inner = _with_moments(projected.inner, theirs)
    # The basis is off by 1e-6, so more numbers than by rounding alone meet a midpoint.
    _check(
      (projected.inner.state1, inner.state1), (projected.inner.state2, inner.state2), rtol=1e-4
    )
  assert (
    theirs['projector'].svd_count > 2 if lazy else theirs['step'] > 2 * group['update_proj_gap']
  )


def _with_moments(state, official):
  """Our state of 8-bit Adam with the official moments."""

  def moment(i):
    if f'absmax{i}' not in official:
      return {'kernel': _array(official[f'state{i}']).T}
    codes, scales = official[f'state{i}'], official[f'absmax{i}']
    return {'kernel': flat_blocks.Flat(_array(codes).reshape(-1), _array(scales))}

  return state._replace(state1=moment(1), state2=moment(2))


def _array(tensor):
  tensor = tensor.detach().clone()
  if str(tensor.dtype) == 'torch.bfloat16':
    return jnp.asarray(tensor.float().numpy(), jnp.bfloat16)
  return jnp.asarray(tensor.numpy())


def _check(*pairs, rtol=1e-6):
  """Codes are the official ones but where f32 rounding meets a midpoint: neighbours, and rare."""
  for mine, official in pairs:
    mine, official = mine['kernel'], official['kernel']
    if not isinstance(mine, flat_blocks.Flat):
      # A first moment is a sum of two terms that may cancel; the larger one's rounding stays.
      mine, official = np.float32(mine), np.float32(official)
      atol = rtol / 10 * np.max(np.abs(official))
      np.testing.assert_allclose(mine, official, rtol=rtol, atol=atol)
      continue
    np.testing.assert_allclose(mine.scales, official.scales, rtol=min(rtol, 1e-4))
    # bf16 weights were rounded before; their neighbours' codes are others a little more often.
    assert np.mean(np.asarray(mine.codes) != np.asarray(official.codes)) < max(1e-3, rtol / 4)
