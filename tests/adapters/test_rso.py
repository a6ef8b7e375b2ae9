"""Random subspaces: what Adam inside them does, what is kept for it, and what a restart leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import adapters, build, models, sharding, weights
from memjax.adapters import over_time
from memjax.plan import collectives
from memjax.steps import whole_tree
from tests import hlo
from tests.adapters import training

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((2, 12, 10)), jnp.float32)
EPS = 1e-2  # Adam amplifies the rounding of gradients below it; an ulp of W is 2e-7.
BATCH = {'x': jnp.asarray(RNG.standard_normal((2, 6, 12)), jnp.float32), 'weights': jnp.ones(1)}


def loss(params, batch):
  """Two layers, each a product by its matrix; a token's output should be all ones."""
  out = jax.vmap(weights.dot)(batch['x'], params['w'])
  return jnp.sum((jnp.tanh(out) - 1) ** 2), jnp.float32(1)


def with_identity(params):
  """Subspaces that are the whole space: r = m and P = I."""
  eye = weights.Frozen(jnp.tile(jnp.eye(12), (2, 1, 1)))
  return {'w': dataclasses.replace(params['w'], a=eye, b=jnp.zeros((2, 12, 10)))}


def run(params, transform, steps, spec=None):
  step = over_time(
    whole_tree.make_train_step(loss, transform), spec, jax.random.key(7), transform.init
  )
  step = jax.jit(step)
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  for _ in range(steps):
    state, _ = step(state, BATCH)
  return state


def test_in_the_whole_space_a_period_is_adam():
  adapted = with_identity(adapters.attach({'w': W}, adapters.RSO(rank=4), jax.random.key(1)))
  dense = run({'w': W}, optax.adam(0.01, eps=EPS), 5)['params']['w']
  inside = run(adapted, memjax.vector_adam(0.01, eps=EPS), 5)['params']
  assert float(jnp.abs(dense - W).max()) > 0.04
  np.testing.assert_allclose(weights.materialize(inside['w']), dense, rtol=0, atol=5e-6)


def test_in_the_whole_space_each_period_is_a_fresh_adam():
  """With P = I throughout: three updates of Adam, then three of another."""
  adapted = with_identity(adapters.attach({'w': W}, adapters.RSO(rank=4), jax.random.key(1)))
  spec = adapters.RSO(rank=4, every=3)
  found = run(adapted, memjax.vector_adam(0.01, eps=EPS), 6, spec)['params']['w']
  dense = W
  for _ in range(2):
    dense = run({'w': dense}, optax.adam(0.01, eps=EPS), 3)['params']['w']
  np.testing.assert_allclose(weights.materialize(found), dense, rtol=0, atol=5e-6)
  assert float(jnp.abs(found.base - W).max()) > 0.02  # The first period is in W.


def test_the_gradient_is_what_the_subspace_sees_of_the_whole_one():
  adapted = adapters.attach({'w': W}, adapters.RSO(rank=4), jax.random.key(1))
  subspace = adapted['w'].a.materialize()
  whole = jax.grad(lambda w: loss({'w': w}, BATCH)[0])(W)
  trained = weights.trained(adapted)
  assert jax.tree.map(jnp.shape, trained) == {'w': {'b': (2, 4, 10)}}
  found = jax.grad(lambda t: loss(weights.replaced(adapted, t), BATCH)[0])(trained)
  expected = jnp.einsum('lmr,lmn->lrn', subspace, whole)
  np.testing.assert_allclose(found['w']['b'], expected, rtol=1e-5, atol=1e-5)
  # Independent normal numbers of variance 1/r, other ones in each layer.
  wide = adapters.attach({'w': jnp.zeros((2, 512, 64))}, adapters.RSO(rank=16), jax.random.key(1))
  drawn = wide['w'].a.materialize()
  assert abs(float(drawn.std()) * 4 - 1) < 4 / np.sqrt(2 * drawn.size)
  assert abs(float(jnp.mean(drawn[0] * drawn[1]))) < 4 / 16 / np.sqrt(drawn.size / 2)


def test_what_is_kept_for_the_backward_pass_has_the_rank_for_width():
  """Of x, 64 wide, nothing is kept: no cotangent goes back to it, and `x P` is 4 wide."""
  x, w = jnp.ones((32, 64)), jnp.ones((64, 48))
  leaf = adapters.RSO(rank=4).adapt(w, jax.random.key(0))
  lora = adapters.LoRA(rank=4).adapt(w, jax.random.key(0))

  def kept(leaf):
    values = weights.trained({'w': leaf})
    use = lambda values: jnp.sum(weights.dot(x * 2, weights.replaced({'w': leaf}, values)['w']))
    _, pull = jax.vjp(use, values)
    return {leaf.shape for leaf in jax.tree.leaves(pull)}

  assert (32, 64) in kept(lora)
  shapes = kept(leaf)
  assert (32, 4) in shapes
  assert (32, 64) not in shapes


def test_a_compiled_program_keeps_the_rank_for_the_width():
  """Each more of some linear layers costs LoRA its x, and RSO a few arrays as wide as the rank."""
  rows, width, rank = 2048, 64, 4

  def memory(spec, layers):
    params = [spec.adapt(jnp.zeros((width, width)), jax.random.key(i)) for i in range(layers)]

    def loss(values, x):
      for leaf in weights.replaced(params, values):
        x = weights.dot(x, leaf)
      return jnp.sum(x**2)

    step = jax.jit(jax.grad(loss)).lower(weights.trained(params), jnp.ones((rows, width)))
    return step.compile().memory_analysis().temp_size_in_bytes

  of_layer = lambda spec: (memory(spec, 10) - memory(spec, 4)) / 6
  assert of_layer(adapters.LoRA(rank=rank, form='split')) >= 4 * rows * width
  assert of_layer(adapters.RSO(rank=rank)) < 5 * 4 * rows * rank


def traced(spec, name, rows, length, **fields):
  """Loss of what is trained, parameters and batch of a model that rematerialises nothing."""
  model = models.create(name, remat='none', **fields)
  init = lambda key: adapters.attach(model.init(key), spec, key) if spec else model.init(key)
  params = jax.eval_shape(init, jax.random.key(0))
  batch = {k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in ('tokens', 'targets')}
  batch['weights'] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
  loss = lambda values, params, batch: model.loss(weights.replaced(params, values), batch)[0]
  return loss, params, batch


def bytes_kept(spec):
  """Bytes of what LLaMA 1B keeps of 16 x 256 tokens for its backward pass, parameters aside."""
  half = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  loss, params, batch = traced(spec, 'llama_1b', 16, 256, **half)
  pull = lambda params, batch: jax.vjp(
    lambda values: loss(values, params, batch), weights.trained(params)
  )[1]
  own = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
  kept = jax.tree.leaves(jax.eval_shape(pull, params, batch))
  return sum(x.size * x.dtype.itemsize for x in kept if (x.shape, x.dtype) not in own)


def test_a_model_keeps_the_rank_in_place_of_the_width():
  """Seven products a layer read four arrays, three of the width and one of the inner width."""
  width, inner, layers, rank, tokens = 2048, 5461, 24, 512, 16 * 256
  saved = 2 * tokens * layers * (3 * width + inner - 7 * rank)
  assert bytes_kept(None) - bytes_kept(adapters.RSO(rank=rank)) == saved
  assert saved / 2**20 == pytest.approx(1503.9, abs=0.1)


@pytest.mark.slow
def test_each_layer_of_a_compiled_model_saves_just_that():
  width, inner, rank, rows, length = 64, 176, 8, 16, 32
  sizes = dict(hidden=width, intermediate=inner, heads=4, kv_heads=4, vocab=128, loss_chunk=128)

  def temporaries(spec, layers):
    loss, params, batch = traced(spec, 'llama_tiny', rows, length, layers=layers, **sizes)
    step = jax.jit(jax.grad(loss)).lower(weights.trained(params), params, batch)
    return step.compile().memory_analysis().temp_size_in_bytes

  of_layers = lambda spec: temporaries(spec, 8) - temporaries(spec, 4)
  saved = 4 * rows * length * 4 * (3 * width + inner - 7 * rank)
  assert of_layers(None) - of_layers(adapters.RSO(rank=rank)) == pytest.approx(saved, rel=0.01)


def test_a_new_subspace_changes_no_value_and_forgets_the_moments():
  params = adapters.attach({'w': W}, adapters.RSO(rank=4), jax.random.key(1))
  transform, spec = memjax.vector_adam(0.01, eps=EPS), adapters.RSO(rank=4, every=3)
  before = run(params, transform, 3)
  restart = jax.jit(lambda state: spec.restart(state, jax.random.key(7), transform.init))
  after = restart(before)
  old, new = before['params']['w'], after['params']['w']
  np.testing.assert_allclose(new.base, weights.materialize(old), rtol=1e-6, atol=1e-6)
  assert not new.b.any()
  assert (new.a.key != old.a.key).all()
  assert all(x.any() for x in jax.tree.leaves(before['opt'][0].mu))
  of_b = [after['opt'][0].mu, after['opt'][0].nu, after['opt'][0].counts]
  assert not any(x.any() for x in jax.tree.leaves(of_b))
  untouched = jax.tree.map(lambda x, y: bool((x == y).all()), before, restart(before | {'step': 4}))
  assert all(v for k, v in untouched.items() if k != 'step' for v in jax.tree.leaves(v))


def test_the_proximal_term_is_decoupled_from_the_moments():
  params = {'w': {'b': jnp.ones((2, 3))}, 'a': jnp.ones((3, 2))}
  transform = memjax.vector_adam(0.1, eta=5.0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = transform.update(zeros, transform.init(params), params)
  np.testing.assert_allclose(updates['w']['b'], -0.1 / 5, rtol=1e-6)
  assert not updates['a'].any()
  with pytest.raises(ValueError, match='eta is -1'):
    memjax.vector_adam(0.1, eta=-1)


def test_factors_learn_at_the_rate_of_the_layers():
  stacked = jnp.zeros((2, 4, 10))
  assert memjax.default_targets('blocks/attn/q/kernel/b', stacked)
  assert memjax.default_targets('blocks/attn/q/kernel/a', stacked)
  assert not memjax.default_targets('blocks/attn/q/b', stacked)  # A bias by its short name.
  assert not memjax.default_targets('head/kernel/b', stacked)


def test_a_rank_above_a_side_says_what_to_do():
  with pytest.raises(ValueError, match=r'w: rank 11 .* shorter side .* leave the leaf out'):
    adapters.attach({'w': W}, adapters.RSO(rank=11), jax.random.key(0))


def config():
  return training.config(dict(name='rso', rank=4, every=2))


@pytest.mark.slow
def test_a_run_resumed_midway_is_the_same():
  training.assert_resumes(config())


@pytest.mark.slow
def test_a_run_layer_by_layer_over_a_mesh_is_the_same():
  whole, layered = training.assert_same_layer_by_layer_over_a_mesh(config())
  leaves = [state['params']['blocks']['attn']['o']['kernel'] for state in (whole, layered)]
  np.testing.assert_array_equal(leaves[0].a.key, leaves[1].a.key)
  np.testing.assert_allclose(*(leaf.base for leaf in leaves), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_devices_reduce_gradients_of_b_alone():
  """Of two adapted matrices, [16, 16] and [16, 32] in two layers, r n numbers and no m n; beside
  them the loss and the count of tokens.
  """
  c = training.config(dict(name='rso', rank=4, every=2, rest=''))
  parts = build.build(c, sharding.make_mesh(8, 1, 1))
  text = parts.step.lower(parts.state, parts.batch).compile().as_text()
  found = hlo.collectives(text)
  assert {x.shape[-2:] for x in found if hlo.elements(x) > 8} <= {(4, 16), (4, 32)}
  assert collectives.count(text) == {'all-reduce': 4 * 2 * 4 * (16 + 32) + 4 + 4}


def test_devices_draw_the_same_subspace():
  state, restart = over_the_layers('float32')
  after = training.assert_same_over_devices(restart, state)
  assert (after['params']['w'].a.key != state['params']['w'].a.key).all()


def over_the_layers(dtype):
  """16 matrices with a small addition, at the end of a period."""
  params = {'w': jnp.ones((16, 64, 64), dtype)}
  spec, transform = adapters.RSO(rank=2, every=2), memjax.vector_adam(0.01)
  params = adapters.attach(params, spec, jax.random.key(0))
  params = weights.replaced(params, {'w': {'b': jnp.full_like(params['w'].b, 1e-3)}})
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  return state | {'step': 2}, lambda state: spec.restart(state, jax.random.key(7), transform.init)


def test_matrices_are_changed_in_place_one_at_a_time():
  state, restart = over_the_layers('float32')
  compiled = jax.jit(restart, donate_argnums=0).lower(state).compile()
  memory, stack = compiled.memory_analysis(), state['params']['w'].base.nbytes
  assert memory.alias_size_in_bytes > stack
  assert memory.temp_size_in_bytes < 4 * stack / 16


def test_bf16_matrices_keep_small_changes_on_average():
  state, restart = over_the_layers('bfloat16')
  added = np.asarray(state['params']['w'].delta(), np.float64)
  assert np.abs(added).mean() < 2**-9  # To nearest, most would be lost.
  base = np.asarray(jax.jit(restart)(state)['params']['w'].base, np.float64)
  # Rounding is independent, and its variance at most the change times an ulp, 2**-7.
  error = np.sqrt(np.sum(np.abs(added) * 2**-7))
  moved = np.sum((base - 1) * np.sign(added))
  assert abs(moved - np.sum(np.abs(added))) < 5 * error
