"""From a config to its model: a preset or a checkpoint's, with the loss of a task."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from memjax import models, run_folder, sharding
from memjax.models import huggingface
from memjax.models.stacked import check_fields


def build_model(config: ConfigDict, mesh: Mesh):
  """Returns the model of a config, its hidden states sharded like the batch.

  Raises:
    ValueError: for an unknown model or field, a folder that holds none, or a task that the model
      cannot do.
  """
  return for_task(config, bare_model(config, **run_fields(config, mesh)))


def bare_model(config: ConfigDict, **fields):
  """Returns the model of a config without the loss of a task; `fields` are those to set."""
  if config.load:
    run = run_folder.find(config.load)
    model = huggingface.describe(config.load) if run is None else bare_model(run.config)
    fields |= model_fields(config, type(model))
    check_fields(type(model), fields)
    return dataclasses.replace(model, **fields)
  family = models.PRESETS.get(config.model, (None,))[0]
  return models.create(config.model, **fields | model_fields(config, family))


def run_fields(config, mesh):
  """Fields of any model that are the run's and not the model's."""
  return dict(
    dtype=jnp.dtype(config.compute_dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    remat=config.remat,
    activations=sharding.batch_sharding(mesh),
  )


def model_fields(config: ConfigDict, family: type | None) -> dict:
  """Returns the fields of a model that a config changes: `model_args`, and an encoder's head."""
  fields = {k: v for k, v in config.model_args.to_dict().items() if v is not None}
  if family is not models.Bert:
    return fields
  fields.pop('loss_chunk', None)  # The default's: an encoder has no logits of a vocabulary.
  if not config.task.name:
    return fields
  from memjax import tasks

  return tasks.head_fields(tasks.resolve(config.task)) | fields


def for_task(config: ConfigDict, model):
  """Returns the model with the loss that a config's task asks for.

  Raises:
    ValueError: when the model cannot do the task, or the step cannot run the model.
  """
  encoder = isinstance(model, models.Bert)
  if encoder and config.step not in ('whole_tree', 'zeroth_order'):
    raise ValueError(
      f'config.step={config.step!r} runs decoders layer by layer, and {config.model!r} is an '
      "encoder; set config.step='whole_tree' or 'zeroth_order'"
    )
  if not config.task.name:
    return model
  from memjax import tasks

  task = tasks.resolve(config.task)
  tasks.check_model(task, model, config.seq_len)
  if config.task.loss == 'tokens' or encoder:
    return model
  return tasks.choosing(task, model)


def loaded_fields(config: ConfigDict, model, mesh: Mesh) -> dict:
  """Returns the fields to set of a checkpoint's model, as `memjax.models.load` takes them, so that
  it is `model`, which `build_model` returned.
  """
  # A task may have put its own loss around a decoder.
  family = type(getattr(model, 'decoder', model))
  return run_fields(config, mesh) | model_fields(config, family)
