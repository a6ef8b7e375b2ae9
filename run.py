"""Trains a model from a config file: `python run.py --config=configs/quickstart.py`.

The same command resumes. `:smoke` after the file name runs it in seconds on a CPU, and
`--config.field=value` changes a field. On a pod, start the same command with `--distributed` on
every host. `--plan=v5e:2x2` only says what the step needs there; `python -m memjax.plan` says more.
"""

import os
import signal

# Until training starts there is nothing to save; sys.exit could be swallowed by an import.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
# The threads of LAPACK, waiting busily between factorisations, would slow XLA's on a CPU.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from memjax import command, plan  # noqa: E402
from memjax.config import run_name  # noqa: E402
from memjax.plan.receipt import show  # noqa: E402
from memjax.train import train  # noqa: E402

CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, then :arguments.')
WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run writes; default runs/<config>.')
PLAN = flags.DEFINE_multi_string('plan', [], 'Say what this device would need, and do not train.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of a pod or cluster.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0; default: found.')
PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes; default: found.')
PROCESS = flags.DEFINE_integer('process', None, 'Index of this process; default: found.')
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where a refused input was found.')


def main():
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  config, file = CONFIG.value, command.config_file()
  if PLAN.value:
    show(plan.plan(config, PLAN.value), f'Memory of one training step of {run_name(file)}')
    return
  workdir = WORKDIR.value or os.path.join('runs', run_name(file))
  if DISTRIBUTED.value or COORDINATOR.value:
    if config.cpu_devices:  # Many processes on a machine without an accelerator.
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  train(config, workdir)


if __name__ == '__main__':
  app.run(
    lambda argv: command.run('run.py', main, TRACEBACK.value),
    flags_parser=command.parser('run.py', CONFIG),
  )
