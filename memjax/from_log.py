"""The weights of a zeroth-order run from its config and its log, without a checkpoint."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from memjax import build as build_lib
from memjax import sharding, weights, workdir
from memjax.estimators.log import load_log
from memjax.steps import replay_streamed
from memjax.steps.replay import replay


def replay_run(directory, *, steps: int | None = None, exact: bool = True, devices=None) -> Any:
  """Returns the parameters after a run with `step='zeroth_order'` or `'streamed'` and
  `optimizer.log_steps`.

  Reads `config.json` and `log.npz`, which the run writes with every checkpoint, and no checkpoint:
  the two files are the fine-tune. The weights that it began with are drawn, or loaded, as by the
  run; then `memjax.replay` makes each update again, without data and without a forward pass. Those
  of a streamed run stay in the host's memory, and each matrix visits the device once, see
  `memjax.steps.replay_streamed`. The two kinds of run have the same log: a model that was trained
  on a larger device is replayed with `step` set to 'streamed' in a copy of its `config.json`.

  Example:
    params = memjax.replay_run('runs/mezo', steps=500)  # As they were after 500 updates.

  Args:
    directory: Work directory of the run, or a folder with the two files.
    steps: Updates, counted from the first; None all of the log.
    exact: As in `memjax.replay`.
    devices: Devices of the config's mesh; default all.

  Raises:
    ValueError: for a directory without a log, another kind of step, and as `memjax.replay`.
  """
  directory = pathlib.Path(directory)
  for name in ('config.json', 'log.npz'):
    if not (directory / name).exists():
      raise ValueError(
        f'{directory / name} does not exist; a run writes both when it first saves, the log with '
        'config.optimizer.log_steps as large as config.steps'
      )
  config = ConfigDict(workdir.read_json(directory / 'config.json'))
  if config.step not in ('zeroth_order', 'streamed'):
    raise ValueError(
      f'{directory}: config.step is {config.step!r}, but a replay makes the updates of '
      "'zeroth_order' and 'streamed' alone; restore a checkpoint"
    )
  mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
  parts = build_lib.build(config, mesh)
  state, log = parts.init(build_lib.root_key(config, 'params')), load_log(directory / 'log.npz')
  if config.step == 'streamed':
    method = build_lib.build_method(config, parts.schedule)
    return replay_streamed.replay(method, state, log, steps=steps, exact=exact)
  params = state['params']
  del state
  key, begin = build_lib.rounding_key(config), weights.trained(params)
  end = replay(parts.transform, begin, log, steps=steps, rounding_key=key, exact=exact)
  return weights.replaced(params, end)
