"""Blocks streamed from host memory: the bits of the step that holds them on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memjax import build, checkpoint, config, sharding, transforms, weights
from memjax.estimators import methods, noise
from memjax.estimators.spsa import dense
from memjax.naming import path_string
from memjax.steps import lockstep, streamed, streams, whole_tree, zeroth_order

EPS, DECAY, SEED = 1e-2, 0.1, 5
LAYERS, VOCAB, WIDTH, INNER = 3, 16, 8, 16
RULES = (
  (r'blocks/up/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/down/kernel', P(None, 'tensor', 'fsdp')),
  (r'.*', P()),
)


class Toy:
  """A model of the kind the step takes: two matrices and a vector a layer."""

  def embed(self, params, tokens):
    return weights.take(params['embed']['embedding'], tokens).astype(jnp.float32)

  def block(self, layer, x):
    scale = weights.materialize(layer['norm']['scale']).astype(x.dtype)
    hidden = jnp.tanh(weights.dot(x * scale[None, None, :], layer['up']['kernel']))
    return x + weights.dot(hidden, layer['down']['kernel'])

  def head_loss(self, params, x, targets, mask):
    logits = weights.dot(x, params['head']['kernel']).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * mask), jnp.sum(mask)

  def loss(self, params, batch):
    x = self.embed(params, batch['tokens'])
    x, _ = jax.lax.scan(lambda x, layer: (self.block(layer, x), None), x, params['blocks'])
    return self.head_loss(params, x, batch['targets'], batch['weights'])


@dataclasses.dataclass(frozen=True)
class Cheap(noise.Noise):
  """Signs from one multiplication, which compile in no time."""

  def at(self, key, row, column):
    bits = (row * np.uint32(0x9E3779B1) + column * np.uint32(0x85EBCA77)) ^ key[0]
    return self.of_bits(bits * np.uint32(0xC2B2AE3D))


CHEAP = Cheap('cheap', noise.rademacher.of_bits)

# Programs of which the bits are compared are not compiled in the tests' own quick way.
AS_USERS_COMPILE = {'xla_cpu_use_fusion_emitters': True} if jax.__version_info__ < (0, 11) else {}
jit = functools.partial(jax.jit, compiler_options=AS_USERS_COMPILE)


def init_params(key, dtype='float32', quantised=False):
  del key
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), dtype)
  store = weights.quantise if quantised else lambda x: x
  return {
    'embed': {'embedding': draw(VOCAB, WIDTH)},
    'blocks': {
      'norm': {'scale': draw(LAYERS, WIDTH)},
      'up': {'kernel': store(draw(LAYERS, WIDTH, INNER))},
      'down': {'kernel': store(draw(LAYERS, INNER, WIDTH))},
    },
    'head': {'kernel': draw(WIDTH, VOCAB)},
  }


def batch_of(step, rows=2, length=8):
  rng = np.random.default_rng(100 + step)
  tokens = rng.integers(0, VOCAB, (rows, length + 1), dtype=np.int32)
  mask = np.asarray(rng.random((rows, length)) < 0.7, np.float32)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': mask}


def rate(count):
  return 0.03 / (1 + count)


def decays(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def optimizer(**options):
  options = dict(learning_rate=rate, noise=CHEAP, seed=SEED, form='weights') | options
  return methods.mezo(eps=EPS, weight_decay=DECAY, mask=decays, **options)


def method_of(rounding=None, transform=None):
  return streamed.Method(transform or optimizer(), dense(CHEAP, SEED), EPS, rounding_key=rounding)


class Run:
  """A streamed run: state on its devices, and the compiled programs."""

  def __init__(self, method, mesh=None, **form):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    init = functools.partial(streamed.init_state, functools.partial(init_params, **form), method)
    shapes = jax.eval_shape(init, jax.random.key(0))
    here = jax.NamedSharding(mesh, P())
    where = sharding.param_shardings(weights.dense(shapes['params']), RULES, mesh)
    where = sharding.weight_shardings(shapes['params'], where)
    self.shardings = {
      'step': here,
      'params': streams.place(where, shapes['params']),
      'opt': jax.tree.map(lambda _: here, shapes['opt']),
    }
    self.fresh = lambda: jax.device_put(init(jax.random.key(0)), self.shardings)
    step = streamed.make_train_step(Toy(), method, shardings=self.shardings)
    self.traceable = step
    out = (self.shardings, None)
    self.step = jit(step, donate_argnums=0, out_shardings=out)
    flush = streamed.make_flush(method, shardings=self.shardings)
    self.flush = jit(flush, out_shardings=self.shardings)


@pytest.fixture(scope='module')
def run():
  return Run(method_of())


def by_definition(rounding):
  """The method with all parameters at hand, from its formulas."""

  def step(params, number, batch):
    def key(path, leaf):
      name = path_string(path)
      layers = jnp.arange(leaf.shape[0]) if name.startswith('blocks/') else None
      return CHEAP.key(jax.random.key(SEED), number, name, layers)

    def value(side):
      def perturb(path, leaf):
        place = key(path, jax.eval_shape(weights.materialize, leaf))
        scale = jnp.full(place.shape[:-1], side, jnp.float32)
        return weights.Perturbed(leaf, place, scale, CHEAP)

      seen = jax.tree.map_with_path(perturb, params, is_leaf=weights.is_weight)
      total, count = Toy().loss(seen, batch)
      return total / count

    slope = (value(EPS) - value(-EPS)) / (2 * EPS)

    def update(path, leaf):
      decay = DECAY * leaf.astype(jnp.float32) if leaf.ndim > 1 else 0
      return -rate(number) * (slope * CHEAP.draw(key(path, leaf), leaf.shape) + decay)

    updates = jax.tree.map_with_path(update, weights.dense(params))
    key_now = None if rounding is None else jax.random.fold_in(rounding, number)
    return transforms.apply_updates(params, updates, key_now), slope

  return jit(step)


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def kinds(tree):
  return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def test_flushed_it_has_the_bits_of_the_zeroth_order_step(run):
  """With a learning rate that falls: the update has the one of the step that made it."""
  transform = optimizer()
  other = whole_tree.init_state(init_params, transform, None)
  unstreamed = jit(zeroth_order.make_train_step(Toy().loss, transform))
  state = run.fresh()
  for i in range(3):
    before = other['params']
    other, metrics = unstreamed(other, batch_of(i))
    state, streamed_metrics = run.step(state, batch_of(i))
    assert metrics['zo/slope'] == streamed_metrics['zo/slope'] > 0
    assert_same_bits(state['params'], before)  # One update behind.
    flushed = run.flush(state)
    assert_same_bits(flushed['params'], other['params'])
  assert state['opt'].due
  assert not flushed['opt'].due
  assert_same_bits(run.flush(flushed)['params'], flushed['params'])  # Nothing is due.
  blocks = {'norm': 'device', 'up': 'pinned_host', 'down': 'pinned_host'}
  for name, kind in blocks.items():
    assert set(jax.tree.leaves(kinds(state['params']['blocks'][name]))) == {kind}
  assert set(jax.tree.leaves(kinds(state['params']['head']))) == {'device'}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('model', 'dtype'), [('llama_tiny', 'float32'), ('opt_tiny', 'float32'), ('opt_tiny', 'bfloat16')]
)
def test_models_have_the_bits_of_the_zeroth_order_step(model, dtype):
  """Of a config, with Gaussian noise; 16 bits are rounded stochastically."""
  ends = []
  for step in ('zeroth_order', 'streamed'):
    c = config.default()
    c.model, c.step, c.batch_size, c.seq_len, c.param_dtype = model, step, 2, 8, dtype
    c.schedule.warmup_ratio = 0.0
    c.optimizer = config.optimizer('mezo', learning_rate=1e-3, eps=1e-2, weight_decay=DECAY)
    parts = build.build(c, sharding.make_mesh(devices=jax.devices()[:1]))
    state = parts.init(build.root_key(c, 'params'))
    for i in range(2):
      batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch_of(i), parts.batch)
      if i == 0:
        train_step = parts.step.lower(state, batch).compile(compiler_options=AS_USERS_COMPILE)
      state, metrics = train_step(state, batch)
    ends.append((parts.flush(state)['params'], metrics['train/loss'], metrics['zo/slope']))
  assert_same_bits(*ends)
  begin = parts.init(build.root_key(c, 'params'))['params']
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), jax.device_get(begin), ends[0][0])
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize('quantised', [False, True], ids=['bf16', 'int8'])
def test_host_copies_of_few_bits(quantised):
  """Rounded stochastically, by the same noise as all at once; the device computes in f32."""
  rounding = jax.random.key(7)
  form = dict(dtype='bfloat16', quantised=quantised)
  run, reference = Run(method_of(rounding), **form), by_definition(rounding)
  params, state = init_params(None, **form), run.fresh()
  for i in range(2):
    state, metrics = run.step(state, batch_of(i))
    params, slope = reference(params, i, batch_of(i))
    assert abs(slope) == metrics['zo/slope'] > 0
  assert_same_bits(run.flush(state)['params'], params)
  kernel = state['params']['blocks']['up']['kernel']
  assert {x.sharding.memory_kind for x in jax.tree.leaves(kernel)} == {'pinned_host'}


def test_flushing_changes_no_later_step(run):
  ends = []
  for flushed in (False, True):
    state, lines = run.fresh(), []
    for i in range(3):
      state, metrics = run.step(state, batch_of(i))
      lines.append(metrics)
      state = run.flush(state) if flushed and i == 0 else state
    ends.append((run.flush(state), lines))
  assert_same_bits(ends[0], ends[1])
  assert all(metrics['zo/update_ulps'] > 0 for metrics in lines)


@pytest.mark.parametrize('flushed', [True, False], ids=['flushed', 'update_due'])
def test_killed_and_resumed_it_gives_the_same_bits(run, tmp_path, flushed):
  """Also between an update and its application."""
  state, _ = run.step(run.fresh(), batch_of(0))
  state = run.flush(state) if flushed else state
  assert bool(state['opt'].due) != flushed
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    checkpoints.maybe_save(state, 1, {}, force=True)
  state, _ = run.step(state, batch_of(1))
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    again = checkpoints.restore(shapes).state
  assert jax.tree.map(lambda x: x.sharding, again) == run.shardings
  again, _ = run.step(again, batch_of(1))
  assert_same_bits(again, state)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(run):
  state, _ = run.step(run.fresh(), batch_of(0))
  before = run.flush(state)['params']
  bad = {**batch_of(1), 'weights': np.full((2, 8), np.inf, np.float32)}
  state, metrics = run.step(state, bad)
  assert metrics['zo/skipped'] == 1
  state = run.flush(state)
  assert_same_bits(state['params'], before)
  state, metrics = run.step(state, batch_of(2))
  assert np.isfinite(metrics['train/loss'])
  assert metrics['zo/skipped'] == 1
  assert not np.array_equal(run.flush(state)['params']['head']['kernel'], before['head']['kernel'])


def test_each_matrix_moves_once_each_way_in_a_layer(run):
  """Read off the trace of the loop over layers: the next layer's first is one of the fetched."""
  traced = jax.make_jaxpr(run.traceable)(run.fresh(), batch_of(0))
  loops = [e for e in traced.jaxpr.eqns if e.primitive.name in ('scan', 'while')]
  names = lambda e: str(e.params.get('jaxpr', e.params.get('body_jaxpr')))
  (body,) = [names(e) for e in loops if 'optimization_barrier' in names(e)]
  assert body.count(' device_put[') == 4  # Two matrices, to the device and back.
  assert body.count('dot_general') == 4  # Each in two passes.


def test_a_model_is_evaluated_from_host_memory(run):
  state = run.fresh()
  view = jax.jit(lambda params, batch: Toy().loss(weights.offloaded(params), batch))
  got = view(state['params'], batch_of(0))
  assert_same_bits(got, jax.jit(Toy().loss)(init_params(None), batch_of(0)))


@pytest.mark.parametrize(
  ('axis', 'shape'),
  [
    ('fsdp', (LAYERS, WIDTH // 2, INNER)),
    pytest.param('tensor', (LAYERS, WIDTH, INNER // 2), marks=pytest.mark.slow),
  ],
)
def test_a_mesh_divides_the_blocks_and_changes_no_result(run, axis, shape):
  mesh = sharding.make_mesh(**{'data': 1, axis: 2}, devices=jax.devices()[:2])
  wide = Run(method_of(), mesh)
  one, two = run.fresh(), wide.fresh()
  for i in range(2):
    one, a = run.step(one, batch_of(i))
    two, b = wide.step(two, batch_of(i))
    # Sums over shards in another order, magnified by 1 / eps.
    np.testing.assert_allclose(a['zo/slope'], b['zo/slope'], rtol=1e-3)
  kernel = two['params']['blocks']['up']['kernel']
  assert kernel.sharding.memory_kind == 'pinned_host'
  assert kernel.addressable_shards[0].data.shape == shape
  expected, found = jax.device_get((run.flush(one)['params'], wide.flush(two)['params']))
  # A slope's error of some 1e-5, times learning rate and noise.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, expected)
  change = jax.tree.map(lambda x, y: np.abs(x - y).max(), expected, init_params(None))
  assert min(jax.tree.leaves(change)) > 1e-4


def test_what_would_have_to_be_streamed_beside_the_weights_is_refused():
  cases = {
    r'keeps state for .*kernel.*zeroth_order': optimizer(momentum=0.9),
    'one direction, all parameters': optimizer(samples=2),
    '0 estimators': optax.sgd(0.1),
  }
  for words, transform in cases.items():
    init = functools.partial(streamed.init_state, init_params, method_of(transform=transform))
    with pytest.raises(ValueError, match=words):
      jax.eval_shape(init, jax.random.key(0))


def test_lockstep_computes_shared_values_once_and_joins_barriers():
  def f(x, w):
    w = jnp.sin(w)
    x, w = jax.lax.optimization_barrier((jnp.cos(x), w))
    return x * w, w + 1

  both = lambda a, b, w: lockstep.both(f, a, b, w)
  (first, second), shared = jax.jit(both)(1.0, 2.0, 3.0)
  one, two = jax.jit(f)(1.0, 3.0), jax.jit(f)(2.0, 3.0)
  assert_same_bits(((first, second), shared), ((one[0], two[0]), one[1]))
  text = str(jax.make_jaxpr(both)(1.0, 2.0, 3.0))
  assert (text.count(' sin '), text.count(' cos ')) == (1, 2)
  assert text.count('optimization_barrier') == 1
  with pytest.raises(ValueError, match='only one of the two'):
    lockstep.both(lambda x, w: (x, x * w), 1.0, 2.0, 3.0)
