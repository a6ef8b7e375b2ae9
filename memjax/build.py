"""From a config to the parts of a run, as shapes: nothing here allocates on a device."""

import functools
import inspect
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from memjax import (
  adapters,
  optimizers,
  peft_folder,
  pretrained,
  schedules,
  sharding,
  transforms,
  weights,
)
from memjax import config as config_lib
from memjax.build_model import build_model, loaded_fields
from memjax.estimators import noise
from memjax.estimators.spsa import dense
from memjax.naming import fold_in_path
from memjax.steps import (
  groups,
  hybrid,
  layerwise,
  offload,
  projected,
  restarts,
  rotations,
  selected,
  selectors,
  slices,
  streamed,
  streams,
  whole_tree,
  zeroth_order,
)


class Parts(NamedTuple):
  """What a training run is put together from."""

  model: Any  # Pure functions of parameters.
  schedule: optax.Schedule  # Learning rate of a count.
  transform: optax.GradientTransformation
  state: dict  # Training state as shapes, with shardings.
  batch: dict  # One batch as shapes, with shardings.
  eval_batch: dict  # The same of `eval_rows`, which is what validation runs on.
  init: Any  # Jitted: key -> state.
  step: Any  # Jitted: (state, batch) -> (state, metrics); donates the state.
  eval_step: Any  # Jitted: (params, batch) -> (loss sum, count).
  flush: Any = lambda state: state  # Applies to the parameters what is due; donates the state.
  view: Any = lambda params: params  # Parameters as the model's functions take them.


def build(config: ConfigDict, mesh: Mesh) -> Parts:
  """Puts a run together over a mesh, whose devices need not exist.

  Raises:
    ValueError: for a config that contradicts itself or does not fit the mesh, naming the field or
    the leaf.
  """
  config_lib.validate(config)
  config = peft_folder.resolved(config)
  sharding.check_batch(config.batch_size, config.accumulate, mesh)
  if config.select.name != 'none':
    sharding.check_batch(config.select.keep, config.accumulate, mesh, 'select.keep')
  model = build_model(config, mesh)
  schedule = build_schedule(config)
  adapter = build_adapter(config)
  loss = _loss(config, model, adapter)
  if config.step == 'streamed':
    return _build_streamed(config, mesh, model, schedule, adapter)
  if config.step == 'hybrid':
    return _build_hybrid(config, mesh, model, schedule, adapter)
  init_params = adapted(pretrained.starting(model, _store(config)), adapter, config, model)
  start = pretrained.shapes(config, model)
  stored = jax.eval_shape(init_params, start)
  placed = _place_params(stored, model, mesh, adapter)
  params, dense_shardings = map(weights.dense, map(weights.trained, (stored, placed)))
  layout = sharding.layout(params, dense_shardings)

  def optimizer(schedule):
    transform = build_transform(config, schedule, layout, model.head_dim)
    return adapters.optimizer_of(adapter, transform, schedule)

  rotation = build_rotation(config, model.layers)
  if rotation is None:
    transform = optimizer(schedule)
  else:
    transform = groups.make_transform(optimizer, rotation, schedule)

  selector = selectors.build(config, model, root_key(config, 'select'))

  def init(key):
    if rotation is None:
      state = whole_tree.init_state(init_params, transform, key)
    else:
      state = groups.init_state(init_params, optimizer, rotation, key)
    return selected.init_state(state, selector)

  state = jax.eval_shape(init, start)
  shardings = {
    'step': NamedSharding(mesh, jax.sharding.PartitionSpec()),
    'params': placed,
    'opt': sharding.state_shardings(state['opt'], params, dense_shardings),
  }
  if 'select' in state:
    shardings['select'] = jax.tree.map(lambda _: shardings['step'], state['select'])
  fraction = config.offload_state
  if fraction < 0:  # What is kept for a group's next turn waits for it in the host's memory.
    fraction = float(rotation is not None and rotation.keep)
  init_placed = init
  if fraction:
    slots = slices.plan(optax.with_extra_args_support(transform), params)
    treedef = jax.tree.structure(jax.eval_shape(transform.init, params))
    shardings['opt'] = offload.place(state['opt'], shardings['opt'], treedef, slots, fraction)

    def init_placed(key):
      state = init(key)
      return state | {'opt': offload.store_all(state['opt'], shardings['opt'], treedef, slots)}

  state = _place(state, shardings)
  gradients = shardings | {'params': dense_shardings}
  if rotation is None:
    train_step = _make_step(config, model, loss, transform, shardings, gradients)
  else:
    train_step = groups.make_train_step(
      model, optimizer, rotation, schedule, shardings=gradients, **_options(config)
    )
    schedule = rotation.learning_rate(schedule)
  key = root_key(config, 'adapter')
  train_step = adapters.over_time(train_step, adapter, key, transform.init)
  train_step = selected.selected(train_step, selector, sharding.batch_sharding(mesh))
  return Parts(
    model=model,
    schedule=schedule,
    transform=transform,
    state=state,
    batch=_pool_shapes(config, mesh, model),
    eval_batch=batch_shapes(eval_rows(config), config.seq_len, mesh, model),
    init=_jit_init(config, model, mesh, init_placed, shardings),
    step=_jit_step(train_step, shardings),
    eval_step=jax.jit(lambda params, batch: model.loss(adapters.at_rest(params), batch)),
    view=adapters.at_rest,
  )


def _build_streamed(config, mesh, model, schedule, adapter) -> Parts:
  """Puts together a run whose blocks live in the host's memory."""
  method = build_method(config, schedule)
  store = _store(config) or (lambda matrix: matrix)
  to_host = lambda matrix: streams.to_host(store(matrix))
  init_params = adapted(pretrained.starting(model, to_host), adapter, config, model)
  init = functools.partial(streamed.init_state, init_params, method)
  state = jax.eval_shape(init, pretrained.shapes(config, model))
  here = NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = _place_params(state['params'], model, mesh)
  shardings = {
    'step': here,
    'params': streams.place(placed, state['params']),
    'opt': jax.tree.map(lambda _: here, state['opt']),
  }
  batch = batch_shapes(config.batch_size, config.seq_len, mesh, model)
  flush = streamed.make_flush(method, shardings=shardings)
  step = streamed.make_train_step(model, method, shardings=shardings)
  over = root_key(config, 'adapter'), method.transform.init, restarts.make_restart(adapter, flush)
  step = adapters.over_time(step, adapter, *over)
  view = lambda params: weights.offloaded(adapters.at_rest(params))
  return Parts(
    model=model,
    schedule=schedule,
    transform=method.transform,
    state=_place(state, shardings),
    batch=batch,
    eval_batch=batch,
    init=_jit_init(config, model, mesh, init, shardings, streams.place),
    step=_jit_step(step, shardings),
    eval_step=jax.jit(lambda params, batch: model.loss(view(params), batch)),
    flush=jax.jit(flush, donate_argnums=0, out_shardings=shardings),
    view=view,
  )


def _build_hybrid(config, mesh, model, schedule, adapter) -> Parts:
  """Puts together a run that estimates gradients of all layers but the last."""
  init_params = adapted(pretrained.starting(model, _store(config)), adapter, config, model)
  last, changed = config.hybrid.layers, config.copy_and_resolve_references()
  name, peak = config.hybrid.optimizer, config.hybrid.learning_rate
  changed.optimizer = config_lib.optimizer(name, learning_rate=peak)
  estimator = adapters.optimizer_of(adapter, build_transform(config, schedule), schedule)
  rate = build_schedule(changed)
  transform = build_transform(changed, rate, None, model.head_dim)
  transform = adapters.optimizer_of(adapter, transform, rate)
  init = functools.partial(hybrid.init_state, init_params, last, estimator, transform)
  state = jax.eval_shape(init, pretrained.shapes(config, model))
  placed = _place_params(state['params'], model, mesh)
  trained = weights.trained(state['params'])

  def of_state(name):
    params, where = trained[name], weights.trained(placed)[name]
    return sharding.state_shardings(state['opt'][name], params, where)

  shardings = {
    'step': NamedSharding(mesh, jax.sharding.PartitionSpec()),
    'params': placed,
    'opt': {name: of_state(name) for name in trained},
  }
  key = rounding_key(config)
  step = hybrid.make_train_step(model, estimator, transform, rounding_key=key, shardings=shardings)
  inits = {'estimated': estimator.init, 'exact': transform.init}
  step = adapters.over_time(step, adapter, root_key(config, 'adapter'), inits)
  loss = hybrid.make_loss(model)
  batch = batch_shapes(config.batch_size, config.seq_len, mesh, model)
  return Parts(
    model=model,
    schedule=schedule,
    transform=estimator,
    state=_place(state, shardings),
    batch=batch,
    eval_batch=batch,
    init=_jit_init(config, model, mesh, init, shardings),
    step=_jit_step(step, shardings),
    eval_step=jax.jit(lambda params, batch: loss(adapters.at_rest(params), batch)),
    view=lambda params: hybrid.join(adapters.at_rest(params)),
  )


def build_method(config: ConfigDict, schedule: optax.Schedule) -> streamed.Method:
  """Returns what a streamed step estimates.

  Raises:
    ValueError: for an optimizer that a streamed step cannot run, naming the field.
  """
  o = {k: config.optimizer.get(k, v) for k, v in optimizers.arguments('mezo').items()}
  known = dict(name='mezo', samples=1, sides=2, blockwise=False)
  for field, only in known.items():
    if config.optimizer.get(field, only) != only:
      raise ValueError(
        f'config.optimizer.{field} is {config.optimizer[field]!r}, but a streamed step sends the '
        f'blocks through the device once, for two values, and keeps no other state: set it to '
        f"{only!r}, or config.step='zeroth_order'"
      )
  family = noise.family(o['noise'], o['density'], o['resample_every'])
  transform = build_transform(config, schedule)
  return streamed.Method(
    adapters.optimizer_of(build_adapter(config), transform, schedule),
    dense(family, o['seed']),
    o['eps'],
    rounding_key=rounding_key(config),
  )


def _make_step(config, model, loss, transform, shardings, gradients):
  """The step of a config in which no groups take turns; `gradients` shards dense parameters."""
  options = _options(config)
  if config.step == 'zeroth_order':
    key = options['rounding_key']
    halves = _halves(shardings['step'].mesh)
    return zeroth_order.make_train_step(
      loss, transform, rounding_key=key, shardings=shardings, halves=halves
    )
  where = config.accumulate_in
  if config.step == 'layerwise' and where == 'subspace':
    some = {k: options[k] for k in ('accumulate', 'rounding_key')}
    return projected.make_train_step(model, transform, shardings=gradients, **some)
  if config.step == 'layerwise':
    return layerwise.make_train_step(model, transform, shardings=gradients, **options)
  return whole_tree.make_train_step(loss, transform, accumulate_in=where, **options)


def _halves(mesh):
  """The sharding of two values over the sides of a mesh, or None."""
  if 'sides' not in mesh.shape:
    return None
  if mesh.shape['fsdp'] > 1 and mesh.shape['tensor'] > 1:
    raise ValueError(
      f'mesh {dict(mesh.shape)}: beside two sides the compiler does not split weights two ways; '
      'set config.mesh.fsdp=1 or config.mesh.tensor=1'
    )
  return NamedSharding(mesh, jax.sharding.PartitionSpec('sides'))


def _loss(config, model, adapter):
  """The model's loss, or the one that an adapter puts in its place."""
  loss = adapter.loss(model) if hasattr(adapter, 'loss') else model.loss
  if config.step not in ('whole_tree', 'zeroth_order') and loss != model.loss:
    raise ValueError(
      f'config.adapter {config.adapter.name!r} compares the hidden states of all layers with the '
      f"original's, which config.step={config.step!r} never has together; set "
      "config.step='whole_tree' or 'zeroth_order', or config.adapter.task_share=1.0"
    )
  return loss


def build_adapter(config: ConfigDict):
  """Returns the specification of a config's adapter, or None."""
  name = config.adapter.name
  if adapters.ADAPTERS[name] is None:
    return None
  return adapters.specification(name, config.adapter)


def adapted(init_params, adapter, config, model):
  """Returns a function of a start that makes parameters, and factors of an adapter beside them.

  Raises:
    ValueError: naming a leaf that `config.adapter.export` could not write.
  """
  if adapter is None:
    return init_params
  leaves = peft_folder.specifications(config)

  def init(start):
    key = fold_in_path(pretrained.key_of(start), 'adapter')
    params = adapters.attach(init_params(start), adapter, key, leaves)
    return adapters.with_factors(params, getattr(start, 'factors', None) or {})

  if config.adapter.get('export'):
    stored = jax.eval_shape(init, pretrained.shapes(config, model))
    adapters.check_peft(stored, peft_folder.of_folder(model))
  return init


def _place_params(params, model, mesh, adapter=None):
  """The shardings of stored parameters, by the model's rules for what they stand for; what an
  adapter keeps in the host's memory is there.
  """
  whole = sharding.param_shardings(weights.whole(params), model.SHARDING, mesh)
  placed = sharding.weight_shardings(params, whole)
  return adapter.place(placed) if hasattr(adapter, 'place') else placed


def _jit_step(step, shardings):
  """Compiles a step that donates its state.

  Every leaf stays an argument, also one that the transform only passes on: what the receipt counts
  is what is alive, and all of it is donated.
  """
  out = (shardings, None)
  return jax.jit(step, donate_argnums=0, out_shardings=out, keep_unused=True)


def _jit_init(config, model, mesh, init, shardings, place=None):
  """Compiles what makes the state, of drawn parameters or of a checkpoint's."""
  options = {'place': place} if place else {}
  if config.load:
    options['fields'] = loaded_fields(config, model, mesh)
  return pretrained.jit_init(config, model, mesh, init, shardings, **options)


def _store(config):
  """What is kept of a matrix as it is drawn; None keeps the matrix."""
  return {'int8': weights.quantise, 'nf4': weights.quantise_nf4}.get(config.weights)


def rounding_key(config: ConfigDict) -> jax.Array | None:
  """Returns the root key of the stochastic rounding of a run, None if it rounds to nearest."""
  return root_key(config, 'rounding') if config.rounding == 'stochastic' else None


def _options(config):
  return dict(
    accumulate=config.accumulate,
    clip_norm=config.clip_norm or None,
    clip_by=config.clip_by,
    rounding_key=rounding_key(config),
  )


def build_schedule(config: ConfigDict) -> optax.Schedule:
  """Returns the learning rate of a config as a function of the count of finished updates."""
  s = config.schedule
  schedule = schedules.SCHEDULES[s.name]
  taken = inspect.signature(schedule).parameters
  restarts = ('restart_every', 'restart_warmup', 'adjust_step')
  return schedule(
    config.optimizer.learning_rate,
    steps=config.steps,
    warmup_steps=_warmup_steps(config),
    final_ratio=s.final_ratio,
    **{field: s[field] for field in restarts if field in taken},
  )


def _warmup_steps(config):
  return int(config.schedule.warmup_ratio * config.steps)


def build_rotation(config: ConfigDict, layers: int) -> rotations.Rotation | None:
  """Returns who trains when, for the steps in which groups of layers take turns.

  Raises:
    ValueError: for turns that do not exist in a model of so many layers, and where no update of the
      run has a learning rate above zero.
  """
  if config.step not in rotations.ROTATIONS:
    return None
  chosen = {k: v for k, v in config.groups.items() if v}
  make = rotations.ROTATIONS[config.step]
  rotation = make(layers, key=root_key(config, 'groups'), **chosen)
  if _warmup_steps(config) and rotation.cycle >= config.steps:
    raise ValueError(
      f'config.steps is {config.steps}, but config.step={config.step!r} goes through all groups in '
      f'{rotation.cycle}, at the learning rate of the first of these, which a warm-up makes 0: '
      'nothing would train; set config.schedule.warmup_ratio=0, larger groups '
      '(config.groups.size), or more steps'
    )
  return rotation


def build_transform(
  config: ConfigDict, learning_rate, layout=None, head_dim: int = 1
) -> optax.GradientTransformation:
  """Returns the optimizer of a config.

  Arguments that only other optimizers take are not given to it.

  Args:
    config: Read for `optimizer` and `layer_scale`.
    learning_rate: A number or a schedule, in place of the config's peak.
    layout: See `memjax.sharding.layout`; given to the optimizers that take it.
    head_dim: Width of the model's attention heads; likewise.
  """
  name = config.optimizer.name
  arguments = {k: config.optimizer.get(k, v) for k, v in optimizers.arguments(name).items()}
  factory = (optimizers.OPTIMIZERS | optimizers.ZEROTH_ORDER)[name]
  given = {'layout': layout, 'head_dim': head_dim}  # By the model and the mesh, not by the config.
  taken = inspect.signature(factory).parameters
  arguments |= {k: v for k, v in given.items() if k in taken}
  transform = factory(**arguments | {'learning_rate': learning_rate})
  transform = _scale_layers(config, transform)
  kept = {'master': transforms.keep_master, 'remainder': transforms.keep_remainder}
  return kept[config.rounding](transform) if config.rounding in kept else transform


def _scale_layers(config, transform):
  if config.layer_scale == 1:
    return transform
  of_layers = optax.masked(optax.scale(config.layer_scale), optimizers.is_target)
  return optax.chain(transform, of_layers)


def batch_shapes(batch_size: int, seq_len: int, mesh: Mesh, model=None) -> dict:
  """Returns a batch as shapes, rows sharded over the mesh: tokens, targets i32 and weights f32, all
  [B, T], or what `model.batch_shapes` says, if it has its own.
  """
  where = sharding.batch_sharding(mesh)
  if hasattr(model, 'batch_shapes'):
    shapes = model.batch_shapes(batch_size, seq_len)
  else:
    dtypes = {'tokens': jnp.int32, 'targets': jnp.int32, 'weights': jnp.float32}
    shape = (batch_size, seq_len)
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in shapes.items()
  }


def eval_rows(config: ConfigDict) -> int:
  """Returns how many rows are measured at a time: as many as are trained on at a time, so that
  neither a whole pool nor a whole batch of micro-batches has to fit.
  """
  chosen = config.select.name != 'none'
  return (config.select.keep if chosen else config.batch_size) // config.accumulate


def _pool_shapes(config, mesh, model):
  """A batch; and, where rows are chosen from it, which source each is from, i32[B]."""
  shapes = batch_shapes(config.batch_size, config.seq_len, mesh, model)
  if config.select.name == 'none':
    return shapes
  where = sharding.batch_sharding(mesh)
  source = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=where)
  return shapes | {'source': source}


def root_key(config: ConfigDict, purpose: str) -> jax.Array:
  """Returns the root key of one kind of draw, from the config's seed."""
  return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(purpose.encode()))


def _place(shapes, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
