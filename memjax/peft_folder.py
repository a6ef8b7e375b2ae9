"""Runs that go on from a folder of `peft`, and runs that leave one.

What the folder says of itself (ranks, scales, which matrices, whether DoRA) takes the place of the
config's own words before anything is built. It goes into `config.json` with them, so that the
folder is read by the first start alone.
"""

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from memjax import adapters, build_model, sharding, weights
from memjax.naming import path_string

# What has the form of `peft`: a product of factors beside weights that stay as they are.
FORMS = ('dora', 'flat_lora', 'lora')


def check(c: ConfigDict) -> None:
  """Checks the fields of a config on folders of `peft` against the others.

  Raises:
    ValueError: naming the field, and the way out.
  """
  a = c.adapter
  name, known = a.name, ('none', *FORMS)
  if a.get('leaves') and not a.get('load'):
    raise ValueError(
      'config.adapter.leaves is what a run notes of config.adapter.load; leave it empty'
    )
  if a.get('load') and name not in known:
    raise ValueError(
      f'config.adapter.load is a folder of LoRA or DoRA, which config.adapter {name!r} is not; '
      "leave config.adapter.name out, or set it to 'lora', 'dora' or 'flat_lora'"
    )
  if not a.get('export'):
    return
  if name == 'none' and not a.get('load'):
    raise ValueError(
      'config.adapter.export writes an adapter, and there is none; set config.adapter.name, or '
      'config.export=True for a folder of the model'
    )
  if name not in known:
    why = 'adds what it learnt to the weights themselves'
    if not hasattr(adapters.ADAPTERS[name], 'restart'):
      why = 'is more than two factors beside each weight'
    raise ValueError(
      f'config.adapter {name!r} {why}, which the form of peft does not hold; set '
      'config.adapter.export=False, and config.export=True for a folder of the merged model'
    )
  if a.rest:
    raise ValueError(
      f'config.adapter.rest={a.rest!r} trains more than the adapters, which the form of peft does '
      "not hold; set config.adapter.rest='', or in place of config.adapter.export "
      'config.export=True for a folder of the merged model'
    )


def resolved(config: ConfigDict, directory: pathlib.Path | None = None) -> ConfigDict:
  """Returns a config in which `adapter` is what its folder holds, or the config as it is.

  Args:
    config: With `adapter.load`, or without.
    directory: Work directory of a run; where it began from this folder, its `config.json` is asked
      and not the folder.

  Raises:
    ValueError: for a folder that is none of this model's, naming the leaf; for a field of
      `config.adapter` that says other than the folder. A field at its default says nothing.
  """
  given = config.adapter
  if not given.get('load') or given.get('leaves'):
    return config
  found = _noted(given, directory) or _described(config)
  _check_agrees(config, found)
  changed = config.copy_and_resolve_references().unlock()
  known = adapters.arguments(found['name'])
  kept = {k: given.get(k, v) for k, v in known.items()}
  found['dtype'] = kept['dtype'] or found['dtype']
  changed.adapter = ConfigDict({'name': found['name'], **kept, **found})
  return changed.lock()


def describe(config: ConfigDict) -> str:
  """Returns one sentence on what a resolved config goes on with."""
  a = config.adapter
  ranks = sorted({rank for rank, _ in a.leaves.values()})
  return (
    f'Adapter {a.load}: {a.name} of rank {" and ".join(map(str, ranks))}, beside '
    f'{len(a.leaves)} leaves'
  )


def specifications(config: ConfigDict) -> dict[str, adapters.Spec] | None:
  """Returns the specification of each leaf that the folder adapts, as `memjax.adapters.attach`
  takes them; None without a folder.
  """
  a = config.adapter
  if not a.get('load'):
    return None
  of_leaf = lambda rank, alpha: {**a.to_dict(), 'rank': rank, 'alpha': alpha}
  return {path: adapters.specification(a.name, of_leaf(*leaf)) for path, leaf in a.leaves.items()}


def shapes(config: ConfigDict, model: Any) -> dict[str, dict] | None:
  """Returns the factors of a folder as shapes: path -> `a`, `b` and perhaps `magnitude`."""
  return None if not config.adapter.get('load') else _factors(_attached(config, model))


def read(config: ConfigDict, model: Any, mesh: Mesh) -> dict[str, dict] | None:
  """Returns the factors of a folder, placed as those beside the model's weights are.

  Host memory: one leaf's factors at a time.

  Raises:
    ValueError: when the folder is not the one that the config was made with.
  """
  if not config.adapter.get('load'):
    return None
  abstract, folder = model.abstract(), config.adapter.load
  found = adapters.open_peft(folder, abstract, of_folder(model))
  noted = {path: tuple(leaf) for path, leaf in config.adapter.leaves.items()}
  here = {path: (leaf.rank, float(leaf.alpha)) for path, leaf in found.leaves.items()}
  if here != noted:
    path = min(path for path in {*here, *noted} if here.get(path) != noted.get(path))
    raise ValueError(
      f'{folder}: {path} has rank and alpha {here.get(path)} there now, and had '
      f'{noted.get(path)} when this run was begun; bring that folder back, or choose another '
      '--workdir'
    )
  whole = sharding.param_shardings(abstract, model.SHARDING, mesh)
  attached = _attached(config, model)
  places = _factors(sharding.weight_shardings(attached, whole))
  dtypes = jax.tree.map(lambda x: x.dtype, _factors(attached))

  def place(x, where, dtype):
    x = np.asarray(x, dtype)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return {path: jax.tree.map(place, found.read(path), places[path], dtypes[path]) for path in here}


def export(config: ConfigDict, model: Any, params: Any, directory: pathlib.Path, step: int):
  """Writes trained adapters as a folder of `peft` and returns its path, `directory/adapter-STEP`.

  What is there already is left alone.

  Args:
    config: Read for `load`, which `peft` is told as the model's name.
    model: Model, perhaps with a task's loss around it.
    params: Its parameters, at rest.
    directory: Work directory of the run.
    step: Finished updates.
  """
  folder = directory / f'adapter-{step}'
  # Process 0 may have finished before another looks.
  if not multihost_utils.broadcast_one_to_all(folder.exists()):
    adapters.save_peft(folder, params, of_folder(model), base=config.load or None)
  return folder


def of_folder(model: Any) -> Any:
  """Returns the model that folders describe, without the loss that a task may have put around."""
  return getattr(model, 'decoder', model)


def _noted(given, directory):
  """What the run in a work directory noted of this folder when it began, or None."""
  file = None if directory is None else directory / 'config.json'
  if file is None or not file.is_file():
    return None
  try:
    noted = json.loads(file.read_text()).get('adapter', {})
  except ValueError:
    return None  # Who reads it next says so.
  if noted.get('load') != given.load:
    return None
  return {k: noted[k] for k in ('name', 'rank', 'alpha', 'rank_stabilized', 'dtype', 'leaves')}


def _described(config):
  """What a folder says of itself, as fields of `config.adapter`."""
  model = of_folder(build_model.bare_model(config))
  folder = adapters.open_peft(config.adapter.load, model.abstract(), model)
  leaves = {path: [leaf.rank, float(leaf.alpha)] for path, leaf in folder.leaves.items()}
  for path, (_, alpha) in leaves.items():
    if not alpha:
      raise ValueError(f'{folder.config.path}: {path} has alpha 0 there, and would not learn')
  # Of most leaves; each has its own beside.
  pairs = [tuple(leaf) for leaf in leaves.values()]
  rank, alpha = max(pairs, key=pairs.count)
  plain = 'flat_lora' if config.adapter.name == 'flat_lora' else 'lora'
  return dict(
    name='dora' if folder.use_dora else plain,
    rank=rank,
    alpha=alpha,
    rank_stabilized=folder.use_rslora,
    dtype=str(np.dtype(folder.dtype)),
    leaves=leaves,
  )


def _check_agrees(config, found):
  """Raises where the config says other than its folder."""
  given = config.adapter
  known = adapters.arguments(given.name)
  said = {k: v for k, v in given.items() if k in known and v != known[k]}
  refuse = lambda what, there: ValueError(
    f'config.adapter.{what}, but {given.load} {there}; leave the field out, or choose another '
    'folder'
  )
  if given.name not in ('none', found['name']):
    raise refuse(f'name is {given.name!r}', f'holds {found["name"]!r}')
  for path, (rank, alpha) in found['leaves'].items():
    if said.get('rank', rank) != rank:
      raise refuse(f'rank is {given.rank}', f'has rank {rank} at {path}')
    root = math.sqrt(rank)
    scale = alpha / (root if found['rank_stabilized'] else rank)
    ours = (given.alpha or rank) / (root if given.get('rank_stabilized') else rank)
    if {'alpha', 'rank_stabilized'} & set(said) and not math.isclose(ours, scale):
      what = 'alpha' if 'alpha' in said else 'rank_stabilized'
      raise refuse(
        f'{what} is {given[what]}, a scale of {ours:g} at rank {rank}',
        f'has a scale of {scale:g} at {path}',
      )
  if 'targets' in said:
    model = build_model.bare_model(config)
    leaves = jax.tree.leaves_with_path(model.abstract())
    ours = adapters.chosen({path_string(path): leaf for path, leaf in leaves}, given.targets)
    if other := sorted(ours ^ set(found['leaves'])):
      has = 'has no adapter for it' if other[0] in ours else 'has an adapter for it'
      chosen = 'chooses' if other[0] in ours else 'leaves out'
      raise refuse(f'targets={given.targets!r} {chosen} {other[0]}', has)


def _attached(config, model):
  """The model's parameters with the folder's adapters, as shapes."""
  spec = adapters.specification(config.adapter.name, config.adapter)
  make = lambda params, key: adapters.attach(params, spec, key, specifications(config))
  return jax.eval_shape(make, model.abstract(), jax.eval_shape(lambda: jax.random.key(0)))


def _factors(params):
  """Path -> `a`, `b` and perhaps `magnitude` of adapted parameters, shapes or shardings."""
  found = {}
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight):
    if hasattr(leaf, 'delta'):
      parts = weights.trained({'': leaf})['']
      found[path_string(path)] = {**parts.pop('adapted', {}), **parts}
  return found
