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
  folder = pathlib.Path(folder).expanduser()
  config, tensors = _open(folder)
  use_dora = bool(config.get('use_dora'))
  found = _modules(tensors, use_dora)
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

  def adapt(path, leaf):
    path = path_string(path)
    if weights.is_weight(leaf) and hasattr(leaf, 'TRAINED') and not isinstance(leaf, weights.NF4):
      raise ValueError(
        f'{path} is a {type(leaf).__name__} leaf already; merge or detach what was attached before'
      )
    if path not in owners:
      return leaf if rest and re.search(rest, path) else weights.Frozen(leaf)
    return _leaf(path, leaf, owners[path], config, tensors, dropout, use_dora)

  return jax.tree.map_with_path(adapt, params, is_leaf=weights.is_weight)


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
  leaves = jax.tree.leaves_with_path(params, is_leaf=weights.is_weight)
  leaves = {path_string(path): leaf for path, leaf in leaves}
  family = families.of_model(model)
  adapted = {path: _plain(path, leaf) for path, leaf in leaves.items()}
  adapted = {path: leaf for path, leaf in adapted.items() if leaf is not None}
  if not adapted:
    raise ValueError('nothing is adapted; attach adapters before they are saved')
  table = _table(family, model)
  linear = {owner.name.path for owners in table.values() for owner in owners}
  if missing := sorted(set(adapted) - linear):
    raise ValueError(f'{missing[0]} is adapted, but is no linear map in the Hugging Face model')
  tensors, ranks, alphas = {}, {}, {}
  for module, owners in table.items():
    for owner in owners:
      if owner.name.path in adapted:
        inner, magnitude = adapted[owner.name.path]
        ranks[module], alphas[module] = inner.b.shape[-2], inner.scale * inner.b.shape[-2]
        tensors |= _tensors(module, owner, inner, magnitude)
  kinds = {magnitude is not None for _, magnitude in adapted.values()}
  if len(kinds) > 1:
    raise ValueError('some leaves are adapted by DoRA and others not; peft has all or none')
  dropout = max(inner.dropout for inner, _ in adapted.values())
  config = _config(family, table, ranks, alphas, kinds.pop(), dropout, base)
  if jax.process_index() == 0:
    _write(pathlib.Path(folder).expanduser(), config, tensors)
  multihost_utils.sync_global_devices(f'save {folder}')


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


def _leaf(path, leaf, owners, config, tensors, dropout, use_dora):
  """The adapted leaf of a matrix or a stack, of the modules that `owners` has by layer."""
  shape = weights.whole(leaf).shape
  layers = range(shape[0]) if len(shape) == 3 else [None]
  if absent := [layer for layer in layers if layer not in owners]:
    raise ValueError(
      f'{tensors.path}: {path} is adapted in some layers, but not in layer {absent[0]}; layers are '
      'stacked here, and all have an adapter or none has'
    )
  read = [_read(path, shape[-2:], *owners[layer], config, tensors) for layer in layers]
  kinds = {(part['a'].shape, part['scale']) for part in read}
  if len(kinds) > 1:
    raise ValueError(
      f'{tensors.path}: {path} has ranks or scales that differ from layer to layer; layers are '
      'stacked here, and have one of each'
    )
  join = lambda name: jnp.asarray(
    np.stack([part[name] for part in read]) if len(shape) == 3 else read[0][name]
  )
  batch = shape[:-2]
  key = jnp.zeros((*batch, 2), jnp.uint32) if dropout else None
  adapted = weights.Adapted(leaf, join('a'), join('b'), key, read[0]['scale'], dropout)
  if use_dora:
    squares = jax.jit(lambda w: jax.lax.map(column_squares, w) if batch else column_squares(w))
    adapted = weights.DoRA(adapted, join('magnitude').astype(jnp.float32), squares(leaf))
  return _placed(adapted, leaf)


def _read(path, shape, module, name: Name, config, tensors) -> dict[str, Any]:
  """One layer's factors, as ours lie, and their scale."""
  whole = slice(None)
  fetch = lambda suffix, axes: tensors.read(f'{PREFIX}{module}.{suffix}', (whole,) * axes)
  a, b = fetch('lora_A.weight', 2).T, fetch('lora_B.weight', 2).T
  parts = {'a': a, 'b': b}
  if config.get('use_dora'):
    parts['magnitude'] = fetch('lora_magnitude_vector', 1)
  if name.rule.stop is not None:  # Their outputs are ours side by side, of one `x A`.
    own = slice(name.rule.start, name.rule.stop)
    parts |= {part: parts[part][..., own] for part in ('b', 'magnitude') if part in parts}
  if (a.shape[0], parts['b'].shape[1]) != shape:
    raise ValueError(
      f'{tensors.path}: {path} is {list(shape)}, but its adapter {module!r} is one of '
      f'{[a.shape[0], parts["b"].shape[1]]}: an adapter of another model'
    )
  rank = _pattern(config.get('rank_pattern'), module, config['r'])
  if {a.shape[1], b.shape[0]} != {rank}:
    raise ValueError(
      f'{tensors.path}: the factors of {module!r} have ranks {a.shape[1]} and {b.shape[0]}, where '
      f'{CONFIG} says {rank}'
    )
  alpha = _pattern(config.get('alpha_pattern'), module, config['lora_alpha'])
  return parts | {'scale': alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)}


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
  if owner.name.rule.stop is not None:
    raise ValueError(
      f'{owner.name.path} is part of {module!r} in the Hugging Face model, which has one adapter '
      'for all its parts; merge, and save the model'
    )
  parts = dict(a=fetch(inner.a, owner.layer).T, b=fetch(inner.b, owner.layer).T)
  if magnitude is not None:
    parts['magnitude'] = fetch(magnitude, owner.layer)
  keys = {part: f'{PREFIX}{module}.{suffix}' for suffix, part in PARTS.items()}
  return {keys[part]: np.ascontiguousarray(value) for part, value in parts.items()}


def fetch(stack: jax.Array, layer: int | None = None) -> np.ndarray:
  """Returns an array, or one layer of it, in host memory, gathered over processes."""
  if not stack.is_fully_addressable:
    stack = multihost_utils.process_allgather(stack, tiled=True)
  return np.asarray(stack) if layer is None else np.asarray(stack[layer])


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
