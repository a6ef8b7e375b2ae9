"""Runs that start from a checkpoint: parameters are read where they would be drawn.

What draws parameters is a function of a key. Here it becomes a function of a `Start`, the key and
what was read, so that everything built on it (adapters, quantised weights, optimizer state) is made
as it would be of drawn ones, in the same compiled program.
"""

import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from memjax import config as config_lib
from memjax import peft_folder, run_folder, sharding
from memjax.models import huggingface
from memjax.naming import fold_in_path, path_string

TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
PARTS = ('vocab.json', 'vocab.txt')  # What older folders have in their place, such as OPT's.
# A checkpoint's embedding is padded by less than this share of its rows.
PADDING = 0.2


class Start(NamedTuple):
  """What a run's parameters are made from, where they are not drawn."""

  key: jax.Array  # Of what is drawn all the same, such as an adapter's factors.
  params: Any = None  # As they were read: dense; None draws them.
  factors: Any = None  # Of a folder of adapters, by path; None begins with those drawn.


def key_of(start: Any) -> jax.Array:
  """Returns the key of a start, which may be the key itself."""
  return start.key if isinstance(start, Start) else start


def starting(model: Any, store: Callable | None = None) -> Callable[[Any], Any]:
  """Returns a function of a start that returns the parameters.

  Args:
    model: Has `init(key, store)`.
    store: Maps one matrix of a block to what is kept of it, such as `memjax.weights.quantise`; None
      keeps it.
  """

  def init(start):
    if isinstance(start, Start) and start.params is not None:
      return start.params if store is None else _stored(start.params, store)
    key = key_of(start)
    return model.init(key) if store is None else model.init(key, store=store)

  return init


def _stored(params: Any, store: Callable) -> Any:
  """Stores matrices layer after layer, so that no copy of a stack is held in another form."""

  def store_layer(matrix):  # Which may have been read into the host's memory.
    return store(jax.device_put(matrix, jax.memory.Space.Device))

  def keep(path, leaf):
    is_matrix = path_string(path).startswith('blocks/') and leaf.ndim == 3
    return jax.lax.map(store_layer, leaf) if is_matrix else leaf

  return jax.tree.map_with_path(keep, params)


def shapes(config: ConfigDict, model: Any) -> Any:
  """Returns what `starting` is called with, as shapes."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = model.abstract() if config.load else None
  factors = peft_folder.shapes(config, model)
  return Start(key, params, factors) if config.load or factors else key


def jit_init(
  config: ConfigDict,
  model: Any,
  mesh: Mesh,
  init: Callable,
  shardings: Any,
  *,
  fields: dict[str, Any] | None = None,
  place: Callable = lambda shardings, params: shardings,
) -> Callable[[jax.Array], Any]:
  """Returns a compiled function of a key that returns the training state.

  Memory beside the state: the factors of `adapter.load`, and of `load` nothing, since the state
  owns what was read; where weights are stored in another form, what was read until it is.

  Args:
    config: Read for `load` and `adapter.load`.
    model: Model.
    mesh: Mesh that its parameters are spread over.
    init: Function of a start that returns the state.
    shardings: Of the state.
    fields: Fields of a checkpoint's model, as `memjax.models.load` takes them.
    place: Changes the shardings of the parameters, such as `memjax.steps.streams.place`.
  """
  if not config.load and not config.adapter.get('load'):
    return jax.jit(init, out_shardings=shardings)
  make = lambda params, factors, key: init(Start(key, params, factors))
  # Not the factors, which are small: bound for the host's memory, donating them aborts the process.
  make = jax.jit(make, donate_argnums=0, out_shardings=shardings)
  abstract = model.abstract()
  places = place(sharding.param_shardings(abstract, model.SHARDING, mesh), abstract)

  def read(key):
    params, drawn = None, fold_in_path(key, 'drawn')
    if config.load and (run := run_folder.find(config.load)):
      params = run_folder.load(run, model, places)
    elif config.load:
      _, params = huggingface.load(config.load, shardings=places, key=drawn, **fields or {})
    factors = peft_folder.read(config, model, mesh)
    with warnings.catch_warnings():  # What is stored in another form is freed all the same.
      warnings.filterwarnings('ignore', 'Some donated buffers were not usable')
      return make(params, factors, key)

  return read


def export(
  config: ConfigDict, model: Any, params: Any, directory: pathlib.Path, step: int
) -> pathlib.Path:
  """Writes a trained model as a Hugging Face folder and returns its path, `directory/model-STEP`.

  What is there already is left alone. The folder or file that the run started from lends its
  tokenizer and what its config says beyond the model.

  Args:
    config: Read for `load`.
    model: Model, perhaps with a task's loss around it.
    params: Its parameters as its functions take them; adapted ones are written merged.
    directory: Work directory of the run.
    step: Finished updates.
  """
  folder = directory / f'model-{step}'
  # Process 0 may have finished before another looks.
  if not multihost_utils.broadcast_one_to_all(folder.exists()):
    source = pathlib.Path(config.load).expanduser()
    like = source if config.load and source.exists() and not run_folder.find(source) else None
    # A task may have put its own loss around a decoder.
    huggingface.save(folder, getattr(model, 'decoder', model), params, like=like)
  return folder


def tokenizer(config: ConfigDict) -> str:
  """Returns the name of a run's tokenizer: the checkpoint's, unless the config names another.

  Raises:
    ValueError: for a checkpoint without one, or whose tokenizer was trained on other text.
  """
  default = config_lib.default().data.tokenizer
  if not config.load or config.data.tokenizer != default:
    return config.data.tokenizer
  if run := run_folder.find(config.load):
    found, there = tokenizer(run.config), tuple(run.config.data.sources)
    if found == 'bpe' and there != tuple(config.data.sources):
      raise ValueError(
        f'the tokenizer of {run.folder} was trained on config.data.sources={there}; set the same '
        f'here, not {tuple(config.data.sources)}, or name its file as config.data.tokenizer'
      )
    return found
  path = pathlib.Path(config.load).expanduser()
  if path.is_file():
    return str(path)
  for name in TOKENIZERS:
    if (path / name).is_file():
      return str(path / name)
  convert = [
    f', or make one of {name}: python -c "from transformers import AutoTokenizer as T; '
    f"T.from_pretrained('{path}').save_pretrained('{path}')\""
    for name in PARTS
    if (path / name).is_file()
  ]
  raise ValueError(
    f'{path} has neither {" nor ".join(TOKENIZERS)}; copy one there, or name one as '
    f'config.data.tokenizer{"".join(convert[:1])}'
  )


def check_tokenizer(config: ConfigDict, opened: Any, vocab_size: int) -> None:
  """Refuses the tokenizer of another model: a model reads its tokens as other words and says
  nothing.

  Its size must be that of the checkpoint, padding apart, and what ends a text there must stand for
  no text in it. 'bytes' and 'bpe', which are never a checkpoint's own, are for trying things out.

  Args:
    config: Read for `load` and the tokenizer's name.
    opened: The tokenizer, a `memjax.data.tokenizers.Tokenizer`.
    vocab_size: Rows of the model's embedding.

  Raises:
    ValueError: naming the tokenizer, the checkpoint's config and the field.
  """
  name = tokenizer(config)
  if not config.load or name in ('bytes', 'bpe') or run_folder.find(config.load):
    return
  found = huggingface.read_config(config.load)
  ends = found.get('eos_token_id')
  ends = {i for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
  if opened.vocab_size < (1 - PADDING) * vocab_size:
    why = f"its {opened.vocab_size:,} ids are too few for 'vocab_size' {vocab_size:,}"
  elif ends and not ends & opened.control:
    why = f"'eos_token_id' {min(ends)} is no end of a text in it"
  else:
    return
  raise ValueError(
    f'tokenizer {name!r} is not that of {found.path}: {why}; copy the tokenizer.json of the model'
  )
