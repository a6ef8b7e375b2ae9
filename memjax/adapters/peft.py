"""Adapters in the form of Hugging Face's `peft`: read beside a model's parameters, and written.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Shapes in this file: our
factors are `a[..., m, r]` and `b[..., r, n]`; theirs are one layer's, `lora_A` `[r, m]` and
`lora_B` `[n, r]`, for PyTorch's linear maps are `[n, m]`.
"""

import collections
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from memjax import sharding, weights
from memjax.models.huggingface import families
from memjax.models.huggingface.checkpoint import SafeTensors
from memjax.models.huggingface.family import BLOCKS, Config, Family, Name
from memjax.naming import nearest, path_string
from memjax.weights.dora import column_squares

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
PARTS = {'lora_A.weight': 'a', 'lora_B.weight': 'b', 'lora_magnitude_vector': 'magnitude'}
# What changes the mathematics, and its one value that is computed here.
PLAIN = dict(
  lora_bias=False,
  layer_replication=None,
  modules_to_save=None,
  target_parameters=None,
  trainable_token_indices=None,
  use_qalora=False,
  alora_invocation_tokens=None,
  arrow_config=None,
)
# Those that leave the model's own weights alone.
INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal')


class Module(NamedTuple):
  """A linear map of theirs, and where ours is."""

  name: Name
  layer: int | None  # None outside the blocks.


class Leaf(NamedTuple):
  """The adapter of one of our leaves, of all its layers."""

  rank: int
  alpha: float
  owners: dict[int | None, tuple[str, Name]]  # Layer -> their linear map.


class Folder(NamedTuple):
  """A folder that was opened; factors are read when asked for."""

  config: Config
  tensors: SafeTensors
  leaves: dict[str, Leaf]  # By path.

  @property
  def use_dora(self) -> bool:
    """Whether columns have magnitudes."""
    return bool(self.config.get('use_dora'))

  @property
  def use_rslora(self) -> bool:
    """Whether the scale is `alpha / sqrt(rank)`."""
    return bool(self.config.get('use_rslora'))

  @property
  def dtype(self) -> Any:
    """Of the factors, the widest."""
    return jnp.result_type(*{entry.dtype for entry in self.tensors.entries.values()})

  def scale(self, path: str) -> float:
    """What the product of a leaf's factors is multiplied by."""
    rank, alpha, _ = self.leaves[path]
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)

  def read(self, path: str) -> dict[str, np.ndarray]:
    """Returns `a`, `b` and perhaps `magnitude` of a leaf, its layers stacked."""
    owners = self.leaves[path].owners
    read = lambda layer: _read(self.tensors, *owners[layer], self.use_dora)
    if None in owners:
      return read(None)
    return _stack([read(layer) for layer in sorted(owners)])


def load_peft(
  folder: str | pathlib.Path, params: Any, model: Any, *, dropout: float = 0.0, rest: str = ''
) -> Any:
  """Returns parameters with the adapters of a folder beside them, and everything else frozen.

  They are as `memjax.adapters.attach` would leave them, to be trained on, merged or written again.
  Reads no pickle.

  Args:
    folder: What `peft`'s `save_pretrained` wrote, of LoRA, rsLoRA or DoRA.
    params: Parameters of the model, arrays or quantised.
    model: Model, of a family that `memjax.models.load` knows.
    dropout: Fraction of the activations that the adapters do not see in training.
    rest: Regular expression searched in leaf paths, of what is trained besides; '' nothing.

  Raises:
    ValueError: naming the file and the field, tensor or leaf: for another kind of adapter, a tensor
      of another model, a target or layer that is missing, parameters that are adapted already.
  """
  found = open_peft(folder, params, model)

  def adapt(path, leaf):
    path = path_string(path)
    if path not in found.leaves:
      return leaf if rest and re.search(rest, path) else weights.Frozen(leaf)
    return _leaf(leaf, found, path, dropout)

  return jax.tree.map_with_path(adapt, params, is_leaf=weights.is_weight)


def open_peft(folder: str | pathlib.Path, params: Any, model: Any) -> Folder:
  """Returns what a folder adapts of a model, each leaf of it checked; no factor is read.

  Args and errors are those of `load_peft`; parameters may be shapes.
  """
  config, tensors = _open(pathlib.Path(folder).expanduser())
  found = _modules(tensors, bool(config.get('use_dora')))
  table = _table(families.of_model(model), model, found)
  _check_targets(config, found)
  if unknown := [module for module in found if module not in table]:
    raise ValueError(
      f'{tensors.path}: {unknown[0]!r} is adapted there, but no matrix of this model is called so; '
      f'{nearest(unknown[0], table)}'
    )
  owners = collections.defaultdict(dict)
  for module in found:
    for each in table[module]:
      owners[each.name.path][each.layer] = (module, each.name)
  leaves = {}
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight):
    path = path_string(path)
    if weights.is_weight(leaf) and hasattr(leaf, 'TRAINED') and not isinstance(leaf, weights.NF4):
      raise ValueError(
        f'{path} is a {type(leaf).__name__} leaf already; merge or detach what was attached before'
      )
    if path in owners:
      leaves[path] = _describe(path, weights.whole(leaf).shape, owners[path], config, tensors)
  return Folder(config, tensors, leaves)


def save_peft(
  folder: str | pathlib.Path, params: Any, model: Any, *, base: str | None = None
) -> None:
  """Writes adapters as a folder that `peft` and `load_peft` read.

  A scale that differs from leaf to leaf becomes `alpha_pattern`, as a rank becomes `rank_pattern`;
  rsLoRA's is written as the `alpha` that gives it. Host memory holds the factors; over several
  processes they are gathered, and process 0 writes.

  Args:
    folder: Where to; made if missing.
    params: Adapted parameters: by `LoRA`, `DoRA`, `FlatLoRA` or what leaves their leaves.
    model: Model.
    base: Name or folder of the model that was adapted, for `peft` to find it.

  Raises:
    ValueError: naming the leaf that this form cannot hold.
  """
  family = families.of_model(model)
  table, adapted = check_peft(params, model)
  tensors, ranks, alphas = {}, {}, {}
  for module, owners in table.items():
    for owner in owners:
      if owner.name.path in adapted:
        inner, magnitude = adapted[owner.name.path]
        ranks[module], alphas[module] = inner.b.shape[-2], inner.scale * inner.b.shape[-2]
        tensors |= _tensors(module, owner, inner, magnitude)
  use_dora = any(magnitude is not None for _, magnitude in adapted.values())
  dropout = max(inner.dropout for inner, _ in adapted.values())
  config = _config(family, table, ranks, alphas, use_dora, dropout, base)
  if jax.process_index() == 0:
    _write(pathlib.Path(folder).expanduser(), config, tensors)
  multihost_utils.sync_global_devices(f'save {folder}')


def check_peft(params: Any, model: Any) -> tuple[dict[str, list[Module]], dict[str, tuple]]:
  """Checks that `save_peft` can write these parameters, which may be shapes.

  Returns:
    Their linear maps with our leaves, and the LoRA and magnitudes, if any, of each adapted leaf.

  Raises:
    ValueError: naming the leaf that this form cannot hold.
  """
  leaves = jax.tree.leaves_with_path(params, is_leaf=weights.is_weight)
  adapted = {path_string(path): _plain(path_string(path), leaf) for path, leaf in leaves}
  adapted = {path: parts for path, parts in adapted.items() if parts is not None}
  if not adapted:
    raise ValueError('nothing is adapted; attach adapters before they are saved')
  table = _table(families.of_model(model), model)
  owners = {owner.name.path: (module, owner) for module in table for owner in table[module]}
  if missing := sorted(set(adapted) - set(owners)):
    raise ValueError(f'{missing[0]} is adapted, but is no linear map in the Hugging Face model')
  for path in adapted:
    module, owner = owners[path]
    if owner.name.rule.stop is not None:
      raise ValueError(
        f'{path} is part of {module!r} in the Hugging Face model, which has one adapter for all '
        'its parts; merge, and save the model'
      )
  if len({magnitude is None for _, magnitude in adapted.values()}) > 1:
    raise ValueError('some leaves are adapted by DoRA and others not; peft has all or none')
  return table, adapted


def _open(folder: pathlib.Path) -> tuple[Config, SafeTensors]:
  path = folder / CONFIG
  if not path.is_file():
    raise ValueError(f'{folder} has no {CONFIG}; a folder that peft wrote has one')
  try:
    config = Config(json.loads(path.read_text(encoding='utf-8')), path)
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is not JSON ({e}); copy the file again') from e
  if (kind := config.get('peft_type')) != 'LORA':
    raise ValueError(f"{path}: 'peft_type' is {kind!r}; adapters of type 'LORA' are read here")
  for field, only in PLAIN.items():
    if config.get(field) not in (only, None, [], {}):
      raise ValueError(f'{path}: {field!r} is {config[field]!r}, which is not computed here')
  if config.get('init_lora_weights') not in INITS:
    raise ValueError(
      f"{path}: 'init_lora_weights' is {config['init_lora_weights']!r}, which changes the "
      'weights of the model too; convert the adapter to LoRA with peft, by '
      'path_initial_model_for_weight_conversion'
    )
  if not (folder / WEIGHTS).is_file():
    pickled = (folder / 'adapter_model.bin').is_file()
    raise ValueError(
      f'{folder} has no {WEIGHTS}'
      + (
        ', but adapter_model.bin. Reading a pickle runs what is in it, so it is not done here; '
        'where you trust it, load it with peft once and save it again'
        if pickled
        else ''
      )
    )
  return config, SafeTensors(folder / WEIGHTS, [folder / WEIGHTS])


def _modules(tensors: SafeTensors, use_dora: bool) -> dict[str, dict[str, str]]:
  """Returns `{module: {part: key}}`, each with all its parts."""
  found = collections.defaultdict(dict)
  for key in tensors.entries:
    suffix = next((suffix for suffix in PARTS if key.endswith(f'.{suffix}')), None)
    if suffix is None or not key.startswith(PREFIX):
      raise ValueError(f'{tensors.path}: tensor {key!r} is no part of a LoRA; it is not read here')
    entry = tensors.entries[key]
    if entry.dtype is None or len(entry.shape) != (1 if 'magnitude' in suffix else 2):
      raise ValueError(f'{tensors.path}: tensor {key!r} is no factor of a linear map')
    found[key[len(PREFIX) : -len(suffix) - 1]][PARTS[suffix]] = key
  wanted = {'a', 'b', 'magnitude'} if use_dora else {'a', 'b'}
  for module, parts in found.items():
    if odd := sorted(wanted ^ set(parts)):
      suffix = next(suffix for suffix, part in PARTS.items() if part == odd[0])
      state = 'unexpected' if odd[0] in parts else 'missing'
      raise ValueError(f'{tensors.path}: tensor {f"{PREFIX}{module}.{suffix}"!r} is {state}')
  return found


def _table(family: Family, model: Any, found: Any = ()) -> dict[str, list[Module]]:
  """Returns `{their linear map: ours}`, several where theirs is ours side by side."""
  bare = found and not any(module.startswith(family.prefix) for module in found)
  table = collections.defaultdict(list)
  for name in family.names(model):
    if not name.path.endswith('kernel'):
      continue
    key = name.key.removesuffix('.weight')
    key = key.removeprefix(family.prefix) if bare else key
    layers = range(model.layers) if name.path.startswith(BLOCKS) else [None]
    for layer in layers:
      table[key.replace('{layer}', str(layer))].append(Module(name, layer))
  return table


def _check_targets(config: Config, found: dict) -> None:
  targets = config.get('target_modules')
  for target in targets if isinstance(targets, list) else []:
    if not any(module == target or module.endswith(f'.{target}') for module in found):
      raise ValueError(
        f"{config.path}: 'target_modules' names {target!r}, of which {WEIGHTS} has no tensor; the "
        'two files are of different adapters'
      )


def _describe(path, shape, owners, config, tensors) -> Leaf:
  """The adapter of a matrix or a stack, of the modules that `owners` has by layer."""
  layers = range(shape[0]) if len(shape) == 3 else [None]
  if absent := [layer for layer in layers if layer not in owners]:
    raise ValueError(
      f'{tensors.path}: {path} is adapted in some layers, but not in layer {absent[0]}; layers are '
      'stacked here, and all have an adapter or none has'
    )
  kinds = {_describe_layer(path, shape[-2:], *owners[i], config, tensors) for i in layers}
  if len(kinds) > 1:
    raise ValueError(
      f'{tensors.path}: {path} has ranks or scales that differ from layer to layer; layers are '
      'stacked here, and have one of each'
    )
  return Leaf(*kinds.pop(), dict(owners))


def _describe_layer(path, shape, module, name: Name, config, tensors) -> tuple[int, float]:
  """One layer's rank and alpha, its tensors having the shapes that go with them."""
  entry = lambda suffix: tensors.entries[f'{PREFIX}{module}.{suffix}']
  a, b = (entry(f'lora_{letter}.weight').shape for letter in 'AB')
  outputs = range(b[0])[_own(name)]  # Their outputs are ours side by side, of one `x A`.
  if (a[1], len(outputs)) != shape:
    raise ValueError(
      f'{tensors.path}: {path} is {list(shape)}, but its adapter {module!r} is one of '
      f'{[a[1], len(outputs)]}: an adapter of another model'
    )
  rank = _pattern(config.get('rank_pattern'), module, config['r'])
  if {a[0], b[1]} != {rank}:
    raise ValueError(
      f'{tensors.path}: the factors of {module!r} have ranks {a[0]} and {b[1]}, where {CONFIG} '
      f'says {rank}'
    )
  return rank, _pattern(config.get('alpha_pattern'), module, config['lora_alpha'])


def _own(name: Name) -> slice:
  """Our part of their outputs."""
  return slice(name.rule.start, name.rule.stop) if name.rule.stop is not None else slice(None)


def _read(tensors, module, name: Name, use_dora) -> dict[str, np.ndarray]:
  """One layer's factors, as ours lie."""
  whole = slice(None)
  fetch = lambda suffix, *index: tensors.read(f'{PREFIX}{module}.{suffix}', index)
  parts = {'a': fetch('lora_A.weight', whole, whole).T}
  parts['b'] = fetch('lora_B.weight', _own(name), whole).T
  if use_dora:
    parts['magnitude'] = fetch('lora_magnitude_vector', _own(name)).astype(np.float32)
  return parts


def _stack(layers):
  return {part: np.stack([layer[part] for layer in layers]) for part in layers[0]}


def _leaf(leaf, found, path, dropout):
  """The adapted leaf of a matrix or a stack."""
  parts = jax.tree.map(jnp.asarray, found.read(path))
  batch = parts['a'].shape[:-2]
  key = jnp.zeros((*batch, 2), jnp.uint32) if dropout else None
  adapted = weights.Adapted(leaf, parts['a'], parts['b'], key, found.scale(path), dropout)
  if found.use_dora:
    squares = jax.jit(lambda w: jax.lax.map(column_squares, w) if batch else column_squares(w))
    adapted = weights.DoRA(adapted, parts['magnitude'], squares(leaf))
  return _placed(adapted, leaf)


def _pattern(patterns: dict | None, module: str, default: Any) -> Any:
  """The value of the first pattern that a module's name ends with."""
  for pattern, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return default


def _placed(adapted, base):
  """The leaf with its factors sharded like the weight they adapt."""
  where = getattr(jax.tree.leaves(base)[0], 'sharding', None)
  if not isinstance(where, jax.sharding.NamedSharding):
    return adapted
  places = sharding.weight_shardings({'leaf': adapted}, {'leaf': where})['leaf']
  return jax.device_put(adapted, places)


def _plain(path, leaf):
  """Returns a LoRA and perhaps magnitudes; None for a frozen leaf."""
  leaf = leaf.value if isinstance(leaf, weights.Offloaded) else leaf
  if isinstance(leaf, weights.Frozen):
    return None
  if isinstance(leaf, weights.DoRA):
    inner, magnitude = leaf.adapted, leaf.magnitude
  else:
    inner, magnitude = leaf.adapted if isinstance(leaf, weights.Flat) else leaf, None
  if isinstance(inner, weights.Restarted):
    raise ValueError(
      f'{path}: its factors are what was learnt since the last restart, and the rest is in the '
      'weights, which the form of peft does not hold; merge the adapters, and save the model'
    )
  if isinstance(inner, weights.Adapted) and not weights.is_weight(inner.a):
    return inner, magnitude
  kind = f'a {type(leaf).__name__}' if weights.is_weight(leaf) else 'an array that is trained'
  raise ValueError(
    f'{path}: {kind} is nothing that the form of peft can hold; merge the adapters, and save the '
    'model'
  )


def _tensors(module, owner, inner, magnitude) -> dict[str, np.ndarray]:
  """One module's tensors by key."""
  parts = dict(a=fetch(inner.a, owner.layer).T, b=fetch(inner.b, owner.layer).T)
  if magnitude is not None:
    parts['magnitude'] = fetch(magnitude, owner.layer)
  keys = {part: f'{PREFIX}{module}.{suffix}' for suffix, part in PARTS.items()}
  return {keys[part]: np.ascontiguousarray(value) for part, value in parts.items()}


def fetch(stack: jax.Array, layer: int | None = None) -> np.ndarray:
  """Returns an array, or one layer of it, in host memory, gathered over processes."""
  if not stack.is_fully_addressable:
    stack = multihost_utils.process_allgather(stack, tiled=True)
  if layer is None or stack.sharding.memory_kind == 'pinned_host':
    return np.asarray(stack)[... if layer is None else layer]
  return np.asarray(stack[layer])


def _config(family, table, ranks, alphas, use_dora, dropout, base) -> dict[str, Any]:
  common = lambda values: collections.Counter(values.values()).most_common(1)[0][0]
  rank, alpha = common(ranks), common(alphas)
  whole = lambda number: int(number) if float(number).is_integer() else float(number)
  causal = 'ForCausalLM' in family.architectures[0]
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM' if causal else None,
    'base_model_name_or_path': base,
    'r': rank,
    'lora_alpha': whole(alpha),
    'rank_pattern': {m: r for m, r in ranks.items() if r != rank},
    'alpha_pattern': {m: whole(a) for m, a in alphas.items() if a != alpha},
    'target_modules': _target_modules(table, ranks),
    'use_dora': use_dora,
    'use_rslora': False,
    'lora_dropout': dropout,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'inference_mode': True,
  }


def _target_modules(table, adapted) -> list[str]:
  """Last parts of names, such as `q_proj`, where all modules of that name are adapted."""
  last = lambda module: module.rsplit('.', 1)[-1]
  partial = {last(module) for module in table if module not in adapted}
  return sorted({module if last(module) in partial else last(module) for module in adapted})


def _write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
  from safetensors.numpy import save_file

  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / WEIGHTS, {'format': 'pt'})
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  (folder / CONFIG).write_text(text, encoding='utf-8')
