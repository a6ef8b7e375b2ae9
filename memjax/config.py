"""What a run is made of: one tree of named fields with defaults, and the checks on it.

A config file calls `default`, changes what its experiment decides, and returns the result:

```python
def get_config(arg=''):
  arg = parse_arg(arg, smoke=False)
  c = default()
  c.model = 'llama_60m'
  c.steps = 4 if arg.smoke else 10_000
  c.optimizer = optimizer('galore', learning_rate=0.01, rank=128)
  return c
```

The tree is locked, so a misspelt field is an error where it is written; `validate` checks what
types cannot.
"""

import ast
import dataclasses
import os
import pathlib
import re
import runpy
import types

from ml_collections import ConfigDict, config_dict

from memjax import adapters, optimizers, peft_folder, ranges, schedules
from memjax.models.create import FAMILIES
from memjax.models.remat import POLICIES
from memjax.naming import nearest
from memjax.steps import rotations, selectors, whole_tree

STEPS = ('whole_tree', 'layerwise', *rotations.ROTATIONS, *optimizers.ZEROTH_ORDER_STEPS)
CLIPS = ('global', 'layer')
ROUNDINGS = ('stochastic', 'nearest', 'master', 'remainder')
WEIGHTS = ('dense', 'int8', 'nf4')
LOSSES = ('tokens', 'options')
OPEN = ('optimizer.', 'adapter.', 'model_args.')  # Fields that another table knows.


def default() -> ConfigDict:
  """Returns a config with every field of a run. Counts are over the whole mesh unless said
  otherwise.
  """
  c = ConfigDict()
  c.model = 'llama_quickstart'  # A name in memjax.models.PRESETS.
  # A Hugging Face folder or a .gguf file, or a run of all weights, by its work directory (whose
  # newest checkpoint it is) or as WORKDIR/checkpoints/STEP: model and parameters are its, whatever
  # `model` is; and so is the tokenizer, unless data.tokenizer names one.
  c.load = ''
  c.model_args = _model_args()  # Fields of the model to change; None is the model's own.
  c.model_args.loss_chunk = 1024
  c.param_dtype = 'float32'
  # Or 'int8': the blocks' matrices in 8 bits, with step='layerwise' to save; or 'nf4', in 4 bits,
  # frozen beneath an adapter.
  c.weights = 'dense'
  c.compute_dtype = 'float32'
  c.remat = 'none'  # What the backward pass recomputes: none, full, dots, ...
  # Of bfloat16 weights when an update is added: 'stochastic' keeps its mean and takes no memory;
  # 'master' adds to an f32 copy, 'remainder' keeps in 2 bytes what rounding took; or 'nearest'.
  c.rounding = 'stochastic'

  # Or 'layerwise': one layer's gradient at a time, rematerialised in full; or 'hift', 'badam' or
  # 'lisa', where groups of layers take turns; or 'zeroth_order', forward passes only, with an
  # optimizer that takes no gradient; or 'streamed', the same with the blocks in host memory.
  c.step = 'whole_tree'
  # Layers in a group, updates between switches, and bottom2up, top2down or random; 0 and '' are
  # what the method's authors chose. With `keep` a layer finds its state again at its next turn in
  # lisa; with `ends` embedding and head have turns in badam. hift's learning rate advances when all
  # groups had a turn: from the zero of a warm-up, so that their first moves nothing.
  c.groups = ConfigDict(dict(size=0, every=0, order='', keep=False, ends=False))
  # Of step='hybrid': the last layers are trained by this optimizer on gradients, the others by
  # `optimizer` on values.
  c.hybrid = ConfigDict(dict(layers=1, optimizer='adamw', learning_rate=1e-5))
  # Fraction of the optimizer state in host memory, streamed layer by layer; -1 is all of it where
  # groups wait for their next turn (hift, and lisa with groups.keep), else none.
  c.offload_state = -1.0
  c.steps = 1000  # Updates.
  c.batch_size = 8  # Sequences an update, all micro-batches together.
  c.select = ConfigDict(selectors.fields())  # Trains on a chosen part of each batch.
  c.accumulate = 1  # Micro-batches an update.
  # Or 'subspace': adds up [r, n] of a matrix, of methods with bases; and layer by layer, keeps the
  # layers' inputs of one micro-batch and not of all.
  c.accumulate_in = 'weights'
  c.seq_len = 128  # Tokens a sequence.
  c.seed = 0  # Of the parameters, the order of the data, and every other draw.

  c.data = ConfigDict()
  c.data.sources = (
    'stdlib',
  )  # Tried in this order: stdlib, text:GLOB, jsonl:GLOB:FIELD, tfds:NAME.
  c.data.tokenizer = 'bpe'  # bpe, bytes, or the path of a tokenizer.json or a SentencePiece model.
  c.data.cache_dir = ''  # Tokens and trained tokenizers; '' is the user's cache folder.
  c.data.validation_fraction = 0.02  # Of the documents.
  c.data.max_tokens = 0  # Reads at most so many; 0 reads all.

  c.task = _task()
  c.optimizer = optimizer('adamw', learning_rate=1e-3)
  # Or 'lora' and its kin: trains factors in place of matrices. adapter.load=FOLDER goes on with a
  # LoRA or DoRA of peft: its name, rank, alpha and targets are the folder's, other fields are read
  # here. adapter.export=True leaves WORKDIR/adapter-STEP, such a folder.
  c.adapter = adapter('none')
  c.layer_scale = 1.0  # Of the learning rate, for the layers' matrices; embedding and head have 1.
  c.schedule = ConfigDict(
    dict(name='cosine', warmup_ratio=0.1, final_ratio=0.1)
  )  # Of `steps`; of the peak.
  # Of schedules that restart, in updates: between restarts, of a later warm-up, done elsewhere.
  c.schedule.update(dict(restart_every=0, restart_warmup=100, adjust_step=0))
  c.clip_norm = 0.0  # Largest norm of the gradient; 0 does not clip.
  c.clip_by = 'global'  # The norm of all gradients together; or 'layer', of each layer's.

  c.log_every = 10  # Updates.
  c.eval_every = 200  # Updates; the last is always evaluated. 0 never evaluates.
  c.eval_tokens = 0  # Evaluates on at most so many tokens; 0 takes the whole validation split.
  c.checkpoint = ConfigDict(dict(every=200, keep=2, keep_every=0))  # Updates, checkpoints, updates.
  # Devices an axis; -1 takes what is left. With 2 sides each half of them runs one of the two
  # forward passes of step='zeroth_order', and holds all parameters.
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sides=1))
  c.cpu_devices = 0  # Virtual devices where there is no accelerator; 0 leaves JAX its choice.
  # Whether the end leaves WORKDIR/model-STEP, a folder that transformers loads, adapters merged.
  c.export = False
  c.sample = ConfigDict(dict(prompt='def ', tokens=64, temperature=0.8))  # After text, not tasks.
  return c.lock()


def _model_args() -> ConfigDict:
  """Returns the fields of all model families that are plain values, each None."""
  fields = [field for family, _ in FAMILIES for field in dataclasses.fields(family)]
  plain = {f.name: kind for f in fields for kind in (int, float, bool, str) if _takes(f, kind)}
  del plain['remat']  # A field of the run.
  return ConfigDict({name: config_dict.placeholder(kind) for name, kind in plain.items()})


def _takes(field: dataclasses.Field, kind: type) -> bool:
  return field.type in (kind, kind | None)


def _task() -> ConfigDict:
  """Returns the fields of a labelled task, which takes the place of `data.sources`."""
  c = ConfigDict()
  c.name = ''  # A key of memjax.tasks.TASKS, or 'jsonl:FILE' with a template; '' trains on text.
  # Files (.jsonl, .json, .csv, .tsv) or 'tfds:NAME@DIR#SPLIT'; '' is the prepared TensorFlow
  # dataset. Without `dev`, the development set is drawn from `train` as below, else it is `test`.
  c.train, c.dev, c.test = '', '', ''
  c.examples = 0  # Drawn from `train`; 0 takes all.
  c.dev_examples = 0  # Drawn from `train` after them.
  c.test_examples = 0  # Drawn from `test`; 0 takes all.
  c.shots = 0  # Instead of `examples`: so many of each label, and as many to develop on.
  c.seed = 0  # Of these draws; the published are 0, and 13, 21, 42, 87, 100 for `shots`.
  c.demonstrations = 0  # Examples shown before every prompt.
  c.loss = 'tokens'  # Of the right option's tokens; or 'options', of the right among all options.
  c.prefix = 'auto'  # Tokens before every text: those of the tokenizer, 'none', or a token's id.
  c.new_tokens = 0  # Most tokens of a generated answer; 0 is the task's own number.
  # Of memjax.tasks.Task, to change; empty leaves the task's own.
  c.template, c.answer, c.label, c.words, c.texts, c.metrics = '', '', '', (), (), ()
  return c


def optimizer(name: str, **arguments) -> ConfigDict:
  """Returns the `optimizer` part of a config: the name and every argument, defaults filled in.

  Raises:
    ValueError: for an unknown name or argument, with the nearest one that exists.
  """
  _look_up('optimizer', name, optimizers.OPTIMIZERS | optimizers.ZEROTH_ORDER)
  return _named('optimizer', name, arguments, optimizers.arguments(name))


def adapter(name: str, **arguments) -> ConfigDict:
  """Returns the `adapter` part of a config, in the same way."""
  _look_up('adapter', name, adapters.ADAPTERS)
  return _named('adapter', name, arguments, adapters.arguments(name))


def _named(what, name, arguments, known):
  for field in arguments:
    if field not in known:
      raise ValueError(f'{what} {name!r} has no argument {field!r}; {nearest(field, known)}')
  filled = {k: arguments.get(k, v) for k, v in known.items()}
  missing = [k for k, v in filled.items() if v is optimizers.REQUIRED]
  if missing:
    raise ValueError(f'{what} {name!r} needs {", ".join(missing)}')
  return ConfigDict(dict(name=name, **filled))


def load(spec: str) -> ConfigDict:
  """Returns the config of `configs/file.py:arguments`, as `run.py --config=` reads it.

  Runs the file as Python.

  Raises:
    ValueError: when there is no such file, it is no config, or refuses its arguments.
  """
  path, _, arg = spec.partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(f'there is no config file {path!r}')
  found = runpy.run_path(path)
  if 'get_config' not in found:
    raise ValueError(f'{path} is no config file: it has no function get_config(arg)')
  c = found['get_config'](arg)
  validate(c)
  return c.lock()


def run_name(spec: str) -> str:
  """Returns a file name for `configs/file.py:arguments`.

  >>> run_name('configs/galore_llama1b.py:smoke,rank=8')
  'galore_llama1b-smoke-rank8'
  """
  path, _, arg = spec.partition(':')
  return re.sub(r'[^\w.-]', '', '-'.join([pathlib.Path(path).stem, *filter(None, arg.split(','))]))


def user_cache() -> pathlib.Path:
  """Returns memjax's folder in the user's cache, where runs share what is made once."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(cache) / 'memjax'


def parse_arg(arg: str, **defaults):
  """Parses what follows the colon in `--config=file.py:smoke,rank=8` into a namespace.

  A bare word switches a boolean on; the others are `name=value` with the type of the default.

  >>> parse_arg('smoke,rank=8', smoke=False, rank=512)
  namespace(smoke=True, rank=8)

  Raises:
    ValueError: for a name without a default, with the nearest one; for a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, equals, text = item.partition('=')
    if name not in defaults:
      raise ValueError(f'the config takes no argument {name!r}; {nearest(name, defaults)}')
    kind = type(defaults[name])
    if not equals:
      text = 'True' if kind is bool else ''
    try:
      values[name] = text if kind is str else kind(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError) as e:
      raise ValueError(
        f'argument {name!r} takes a {kind.__name__}, as in {name}=..., not {text!r}'
      ) from e
  return types.SimpleNamespace(**values)


def check_field(c: ConfigDict, path: str) -> None:
  """Raises a `ValueError` if a config has no field such as `optimizer.rank`, with the nearest in
  that group.
  """
  group = c
  for name in path.split('.'):
    if not isinstance(group, ConfigDict):
      raise ValueError(f'config.{path} does not exist: what is before .{name} is a single field')
    if name not in group:
      raise ValueError(f'the config has no field {path!r}; {nearest(name, group.keys())}')
    group = group[name]


def validate(c: ConfigDict) -> None:
  """Checks a config before anything is allocated.

  Raises:
    ValueError: naming the field, its value and what it may be.
  """
  _check_fields(c.to_dict(), default().to_dict(), '')
  _look_up('schedule.name', c.schedule.name, schedules.SCHEDULES)
  every = optimizers.OPTIMIZERS | optimizers.ZEROTH_ORDER
  _check_named('optimizer', c.optimizer.to_dict(), every, optimizers.arguments)
  _check_named('adapter', c.adapter.to_dict(), adapters.ADAPTERS, adapters.arguments)
  ranges.check(c)
  peft_folder.check(c)
  _check_step(c)
  _check_zeroth_order(c)
  _check_sides(c)
  _check_task(c)
  selectors.check(c)
  if c.batch_size % c.accumulate:
    raise ValueError(
      f'config.batch_size {c.batch_size} is not a multiple of config.accumulate {c.accumulate}'
    )
  _look_up('remat', c.remat, POLICIES)
  for field in ('param_dtype', 'compute_dtype'):
    _look_up(field, c[field], ('float32', 'bfloat16', 'float16'))


def _check_step(c: ConfigDict) -> None:
  _look_up('step', c.step, STEPS)
  _look_up('clip_by', c.clip_by, CLIPS)
  _look_up('weights', c.weights, WEIGHTS)
  _check_restarts(c)
  _look_up('rounding', c.rounding, ROUNDINGS)
  if c.weights == 'int8' and c.rounding != 'stochastic':
    raise ValueError(
      "config.weights='int8' loses every update under half a step of 8 bits when it is rounded to "
      "nearest, which is most of them; set config.rounding='stochastic'"
    )
  if c.weights == 'nf4' and not _is_adapted(c):
    raise ValueError(
      "config.weights='nf4' holds weights that stay as they are: 16 levels lie too far apart to be "
      "trained. Train beside them with config.adapter.name='lora', or set config.weights='int8'"
    )
  _check_groups(c)
  if not (0 <= c.offload_state <= 1 or c.offload_state == -1):
    raise ValueError(
      f'config.offload_state is {c.offload_state}; it is a fraction, in [0, 1], or -1 for the '
      'choice of config.step'
    )
  if c.offload_state > 0 and c.step == 'whole_tree':
    raise ValueError(
      f'config.offload_state is {c.offload_state}, but the ordinary step needs the whole state at '
      "once; set config.step='layerwise'"
    )
  whole_tree.check_accumulation(c.accumulate_in, c.clip_norm)
  if c.accumulate_in != 'weights' and c.step not in ('whole_tree', 'layerwise'):
    raise ValueError(
      f'config.accumulate_in is {c.accumulate_in!r}, which config.step={c.step!r} does not read; '
      "set config.accumulate_in='weights', or config.step='whole_tree' or 'layerwise'"
    )
  if c.step != 'whole_tree' and c.remat not in ('none', 'full'):
    raise ValueError(
      f'config.remat is {c.remat!r}, but the layer-by-layer step keeps the input of a layer and '
      "nothing else, as 'full' does; set config.remat='full', or config.step='whole_tree'"
    )


def _is_adapted(c: ConfigDict) -> bool:
  return c.adapter.name != 'none' or bool(c.adapter.get('load'))


def _check_groups(c: ConfigDict) -> None:
  takers = lambda field: [s for s in rotations.ROTATIONS if field in rotations.arguments(s)]
  for field, value in c.groups.items():
    if value and c.step not in takers(field):
      raise ValueError(
        f'config.groups.{field} is {value!r}, which config.step={c.step!r} does not read; leave it '
        f'out, or set config.step to {" or ".join(map(repr, takers(field)))}'
      )


def _check_restarts(c: ConfigDict) -> None:
  """A method that changes factors and their state needs both on the device, with no update due."""
  if not hasattr(adapters.ADAPTERS[c.adapter.name], 'restart'):
    return
  if c.weights != 'dense':
    raise ValueError(
      f'config.adapter {c.adapter.name!r} adds what it learnt to the weights, and '
      f'config.weights={c.weights!r} would round the sums coarsely each time: set '
      "config.weights='dense', or config.adapter.name='lora', which leaves weights alone"
    )
  if c.step in rotations.ROTATIONS or c.offload_state > 0:
    raise ValueError(
      f'config.adapter {c.adapter.name!r} restarts the optimizer from time to time, which '
      f'config.step={c.step!r} with config.offload_state={c.offload_state} does not let it; set '
      "config.step='whole_tree', 'layerwise' or 'zeroth_order', and config.offload_state=0"
    )
  if c.step == 'streamed' and c.adapter.get('pool', 'keys') != 'keys':
    raise ValueError(
      f'config.adapter.pool={c.adapter.pool!r} keeps pools beside the weights, which '
      "config.step='streamed' would send through the device; set config.adapter.pool='keys'"
    )
  if c.step == 'hybrid' and c.adapter.get('pool') == 'host':
    raise ValueError(
      "config.adapter.pool='host' holds the pools of all layers together, which "
      "config.step='hybrid' cuts in two; set config.adapter.pool='keys' or 'device'"
    )


def _check_task(c: ConfigDict) -> None:
  _look_up('task.loss', c.task.loss, LOSSES)
  for field in ('examples', 'dev_examples', 'test_examples', 'shots', 'demonstrations'):
    if c.task[field] < 0:
      raise ValueError(f'config.task.{field} is {c.task[field]}; it counts examples')
  if c.task.shots and (c.task.examples or c.task.dev_examples):
    raise ValueError(
      f'config.task.shots is {c.task.shots}, which draws as many of each label to train and to '
      'develop on; set config.task.examples=0 and config.task.dev_examples=0, or shots=0'
    )
  if c.task.loss != 'tokens' and (not c.task.name or c.step not in ('whole_tree', 'zeroth_order')):
    raise ValueError(
      f'config.task.loss={c.task.loss!r} compares the options of a task, which config.step='
      f"{c.step!r} does not; set config.task.loss='tokens', or config.step='whole_tree' or "
      "'zeroth_order'"
    )


def _check_zeroth_order(c: ConfigDict) -> None:
  """The optimizer must be one that takes values where the step gives values, and only there."""
  takes_values, gives_values = (
    c.optimizer.name in optimizers.ZEROTH_ORDER,
    c.step in optimizers.ZEROTH_ORDER_STEPS,
  )
  if takes_values and not gives_values:
    raise ValueError(
      f'config.optimizer {c.optimizer.name!r} estimates gradients from values of the loss, which '
      f"config.step={c.step!r} does not give it; set config.step='zeroth_order'"
    )
  if not gives_values:
    return
  if c.step == 'hybrid':
    _look_up('hybrid.optimizer', c.hybrid.optimizer, optimizers.OPTIMIZERS)
  if not takes_values:
    raise ValueError(
      f'config.step={c.step!r} makes no gradient, which config.optimizer {c.optimizer.name!r} '
      f'needs; choose one of {", ".join(optimizers.ZEROTH_ORDER)}'
    )
  if c.accumulate != 1:
    raise ValueError(
      f'config.accumulate is {c.accumulate}, but there are no gradients to accumulate; lower '
      'config.batch_size, or average over directions with config.optimizer.samples'
    )
  if c.clip_norm:
    raise ValueError(
      f'config.clip_norm is {c.clip_norm}, but the norm of an estimate is that of its noise; leave '
      'it at 0 and lower config.optimizer.learning_rate'
    )
  if c.weights != 'dense' and c.step != 'streamed' and not _is_adapted(c):
    raise ValueError(f"config.step={c.step!r} goes with config.weights='dense' alone")
  if c.offload_state > 0:
    raise ValueError(f'config.step={c.step!r} goes with config.offload_state=0 alone')


def _check_sides(c: ConfigDict) -> None:
  """A mesh with two sides is for steps that take two values."""
  if c.mesh.sides not in (1, 2):
    raise ValueError(f'config.mesh.sides is {c.mesh.sides}, but a direction has one side or two')
  values = c.optimizer.get('sides', 2) if c.step == 'zeroth_order' else 1
  if c.mesh.sides == 2 and values != 2:
    raise ValueError(
      f'config.mesh.sides is 2, but config.step={c.step!r} with this optimizer has no two forward '
      "passes to run side by side; set config.mesh.sides=1, or config.step='zeroth_order' with "
      'config.optimizer.sides=2'
    )


def _check_named(what: str, fields: dict, every: dict, arguments) -> None:
  """Names only; arguments that another of `every` takes are left unread, so that `name` alone can
  be overridden.
  """
  _look_up(what, fields.get('name'), every)
  known = set(arguments(fields['name']))
  foreign = {a for name in every for a in arguments(name)}
  for field in fields:
    if field not in known | foreign | {'name'}:
      raise ValueError(f'{what} has no argument {field!r}; {nearest(field, known)}')


def _look_up(what, name, table):
  if name not in table:
    raise ValueError(f'{what} {name!r} does not exist; {nearest(str(name), table)}')
  return table[name] if isinstance(table, dict) else name


def _check_fields(given: dict, known: dict, prefix: str) -> None:
  """Field names and types, for configs that were not built on `default`."""
  for name, value in given.items():
    path = f'{prefix}{name}'
    if prefix in OPEN:
      continue  # Checked against the function that takes them.
    if name not in known:
      raise ValueError(f'config.{path} does not exist; {nearest(name, known)}')
    if isinstance(known[name], dict):
      if not isinstance(value, dict):
        raise ValueError(f'config.{path} is a group of fields, not {value!r}')
      _check_fields(value, known[name], f'{path}.')
    elif not _same_type(value, known[name]):
      raise ValueError(f'config.{path} takes a {type(known[name]).__name__}, not {value!r}')
  missing = [k for k in known if k not in given and prefix not in OPEN]
  if missing:
    raise ValueError(f'config.{prefix}{missing[0]} is missing; start from memjax.config.default()')


def _same_type(value, like) -> bool:
  if isinstance(like, float):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if isinstance(like, (tuple, list)):
    return isinstance(value, (tuple, list))
  return type(value) is type(like)
