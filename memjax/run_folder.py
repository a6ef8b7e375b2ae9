"""Earlier runs as what a run starts from: the model and the parameters of one of their checkpoints.

A checkpoint knows the config that it was made with, so that its folder alone is enough.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from memjax import checkpoint
from memjax.naming import path_string


class Run(NamedTuple):
  """A checkpoint that was found."""

  folder: pathlib.Path
  step: int  # Finished updates.
  config: ConfigDict  # Of the run, which may lack fields that are younger.
  leaves: dict[str, dict]  # Path -> 'shape', 'dtype' and 'digest', of the whole training state.


def find(path: str | pathlib.Path) -> Run | None:
  """Returns the newest checkpoint of a work directory, or the one whose folder this is, such as
  `WORKDIR/checkpoints/5000`; None where neither is.

  Raises:
    ValueError: for a work directory without a checkpoint, or a checkpoint that is damaged.
  """
  path = pathlib.Path(path).expanduser()
  if (path / 'checkpoints').is_dir():
    steps = [int(p.name) for p in (path / 'checkpoints').iterdir() if p.name.isdecimal()]
    if not steps:
      raise ValueError(
        f'{path} is the work directory of a run without a checkpoint; train it first'
      )
    path = path / 'checkpoints' / str(max(steps))
  if not (path.name.isdecimal() and (path / 'metadata').is_dir()):
    return None
  record = checkpoint.read_record(path)
  made = (record['metadata'] or {}).get('config')
  if made is None:
    raise ValueError(f'{path} does not say of which config it is; save it with memjax.train')
  return Run(path, int(path.name), ConfigDict(made), record['leaves'])


def full_rank(path: str, model: str) -> str:
  """Returns the path of a run that trained all weights of a model, for `config.load`.

  Args:
    path: Its work directory, or one of its checkpoints; '' for none.
    model: Name of the model, a key of `memjax.models.PRESETS`.

  Raises:
    ValueError: for a folder that is something else.
  """
  run = find(path) if path else None
  if not path:
    return path
  if run is None:
    raise ValueError(
      f'{path!r} is neither the work directory of a run nor a checkpoint of one; train all weights '
      'first, or name a Hugging Face folder as config.load'
    )
  if run.config.model != model or run.config.load:
    raise ValueError(
      f'{run.folder} is of a run of {run.config.load or run.config.model!r}, and this one is of '
      f'{model!r}; choose a run of the same model'
    )
  check(run)
  return path


def check(run: Run) -> None:
  """Refuses a run whose checkpoints do not hold the weights of a model as they are.

  Raises:
    ValueError: naming the field of its config.
  """
  c = run.config
  for field, value, plain in (
    ('adapter.name', c.get('adapter', {}).get('name', 'none'), 'none'),
    ('weights', c.get('weights', 'dense'), 'dense'),
  ):
    if value != plain:
      raise ValueError(
        f'{run.folder} is of a run with config.{field}={value!r}, not of one that trains all '
        'weights as they are; name the folder that it left with config.export=True'
      )
  if c.step == 'hybrid':
    raise ValueError(
      f"{run.folder} is of a run with config.step='hybrid', which keeps its layers in two parts; "
      'name the folder that it left with config.export=True'
    )


def load(run: Run, model: Any, shardings: Any) -> Any:
  """Returns the parameters of a run, in the dtype of the model's; the optimizer's state stays on
  disk.

  Memory: the parameters, and where the run had them in another dtype those too.

  Raises:
    ValueError: naming the leaf which the run has otherwise, or which is damaged.
  """
  check(run)
  abstract = model.abstract()
  wanted = jax.tree.leaves_with_path(abstract)
  for path, leaf in wanted:
    name = f'params/{path_string(path)}'
    found = tuple(run.leaves.get(name, {}).get('shape', ()))
    if found != leaf.shape:
      raise ValueError(
        f'{run.folder}: {name} has shape {found} there and {leaf.shape} in this model; start from '
        'a run of the same model'
      )

  def saved(path, leaf, where):
    dtype = jnp.dtype(run.leaves[f'params/{path_string(path)}']['dtype'])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where)

  there = jax.tree.map_with_path(saved, abstract, shardings)
  params = checkpoint.read_part(run.folder, run.leaves, {'params': there})['params']
  if jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, abstract):
    return params
  cast = lambda params: jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract)
  return jax.jit(cast, out_shardings=shardings)(params)
