"""Every transform of the contract, layer by layer against all at once."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memjax import optimizers, sharding
from memjax.steps import layerwise, whole_tree
from tests.contract.test_contract import TRANSFORMS
from tests.models.tiny import assert_trees_close

LAYERS, VOCAB, WIDTH, INNER = 3, 16, 12, 20


class Toy:
  """A model of the kind `layerwise` takes, in three lines."""

  tied = False

  def embed(self, params, tokens):
    return params['embed']['embedding'][tokens]

  def block(self, layer, x):
    hidden = jnp.tanh(x @ layer['mlp']['kernel'] + layer['norm']['scale'][None, None, :])
    return x + hidden[..., :WIDTH]

  def head_loss(self, params, x, targets, weights):
    logits = jax.nn.log_softmax(x @ params['head']['kernel'])
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * weights), jnp.sum(weights)

  def loss(self, params, batch):
    x = self.embed(params, batch['tokens'])
    x, _ = jax.lax.scan(lambda x, layer: (self.block(layer, x), None), x, params['blocks'])
    return self.head_loss(params, x, batch['targets'], batch['weights'])


def init_params(key):
  del key
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {
    'embed': {'embedding': draw(VOCAB, WIDTH)},
    'blocks': {
      'norm': {'scale': draw(LAYERS, INNER)},
      'mlp': {'kernel': draw(LAYERS, WIDTH, INNER)},
    },
    'head': {'kernel': draw(WIDTH, VOCAB)},
  }


def batch_of(step, rows=8, length=8):
  rng = np.random.default_rng(100 + step)
  tokens = rng.integers(0, VOCAB, (rows, length + 1), dtype=np.int32)
  weights = np.asarray(rng.random((rows, length)) < 0.7, np.float32)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': weights}


def train(step, transform, steps=4, shardings=None):
  init = lambda key: whole_tree.init_state(init_params, transform, key)
  state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
  rows = shardings and sharding.batch_sharding(shardings['step'].mesh)
  step, losses = jax.jit(step, out_shardings=shardings and (shardings, None)), []
  for i in range(steps):
    state, metrics = step(state, jax.device_put(batch_of(i), rows))
    losses.append(metrics)
  return state, losses


def make(name):
  if name == 'muon':  # `scale_by_muon` refuses vectors; the optimizer sends them elsewhere.
    return optimizers.OPTIMIZERS['muon'](0.01)
  return optax.chain(TRANSFORMS[name].make(), optax.scale(-0.01))


# In every run of the tests: bases whose noise has an address, factors, and plain arithmetic. The
# others, each a compilation of two steps, are marked slow.
COMMON = ('galore', 'adalomo', 'lion')
# Gradients have the same bits; so have updates that the compiler does not fuse in another order.
EXACT = ('limit_norm_growth', 'lion', 'sm3')


@pytest.mark.parametrize(
  'name', [n if n in COMMON else pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMS]
)
def test_layer_by_layer_is_all_at_once(name):
  transform = make(name)
  ordinary = train(whole_tree.make_train_step(Toy().loss, transform), transform)
  layered = train(layerwise.make_train_step(Toy(), transform), transform)
  # Arithmetic in another order, 1e-7, which division by small moments enlarges; 1e-6 of the largest
  # entry everywhere but in state that is itself a quotient of small numbers.
  exact = name in EXACT
  assert_trees_close(layered[0]['params'], ordinary[0]['params'], 0 if exact else 1e-6)
  assert_trees_close(layered[0]['opt'], ordinary[0]['opt'], 0 if exact else 1e-5)
  assert_trees_close(layered[1], ordinary[1], 1e-6)  # Norms are summed in another order.


# Optimizers as a config makes them, on a mesh; all leaves quantised where any are.
SHORT = dict(rank=4, refresh_every=3)
ON_A_MESH = {
  'adam4bit': dict(min_size=1),
  'adam_mini': {},
  'adamw8bit': dict(min_size=1),
  'apollo': SHORT,
  'apollo_mini8bit': dict(refresh_every=3, min_size=1),
  'came': {},
  'fira': SHORT,
  'galore8bit': dict(SHORT, min_size=1),
  'muon': {},
  'q_galore': SHORT,
  'q_galore8bit': dict(SHORT, min_size=1),
  'sm3': {},
}
RULES = ((r'mlp/kernel', P(None, 'fsdp')), (r'(embed|head)/.*', P('fsdp')), (r'.*', P()))


@pytest.mark.slow
@pytest.mark.parametrize('name', ON_A_MESH)
def test_layer_by_layer_is_all_at_once_on_a_mesh(name):
  """Rows of every matrix over four devices, and of the batch over eight."""
  mesh = sharding.make_mesh(data=2, fsdp=4)
  params = jax.eval_shape(init_params, None)
  where = sharding.param_shardings(params, RULES, mesh)
  factory, given = optimizers.OPTIMIZERS[name], dict(ON_A_MESH[name])
  if 'layout' in inspect.signature(factory).parameters:
    given['layout'] = sharding.layout(params, where)
  transform = factory(0.01, **given)
  opt = sharding.state_shardings(jax.eval_shape(transform.init, params), params, where)
  shardings = {'step': jax.NamedSharding(mesh, P()), 'params': where, 'opt': opt}
  ordinary, layered = (
    train(step, transform, shardings=shardings)
    for step in (
      whole_tree.make_train_step(Toy().loss, transform),
      layerwise.make_train_step(Toy(), transform, shardings=shardings),
    )
  )
  # A number between two codes may get either, of a rounding error: seen with `adamw8bit` alone.
  params, opt, metrics = (1e-4, 1.01 / 255, 2e-6) if name == 'adamw8bit' else (2e-6, 1e-5, 1e-6)
  assert_trees_close(layered[0]['params'], ordinary[0]['params'], params)
  assert_trees_close(layered[0]['opt'], ordinary[0]['opt'], opt)
  assert_trees_close(layered[1], ordinary[1], metrics)
