"""Trains a model from a config file: `python run.py --config=configs/quickstart.py`.

The same command resumes. SIGTERM saves and exits with 0; Ctrl-C saves and exits with 130, pressed
again it exits at once. `:smoke` after the file name runs it in seconds on a CPU, and
`--config.field=value` changes a field. On a pod, start the same command with `--distributed` on
every host. `--plan=v5e:2x2` only says what the step needs there; `python -m memjax.plan` says more.
`--evaluate=FOLDER` measures a run, or pretrained weights, on the test split of the config's task.
"""

import os
import signal

# Until training starts there is nothing to save; sys.exit could be swallowed by an import.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # As in the background of a script.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))
# The threads of LAPACK, waiting busily between factorisations, would slow XLA's on a CPU.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from memjax import command, tasks  # noqa: E402
from memjax.config import run_name  # noqa: E402
from memjax.plan.planning import try_plan  # noqa: E402
from memjax.plan.receipt import show  # noqa: E402
from memjax.train import train  # noqa: E402

CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, then :arguments.')
WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run writes; default runs/<config>.')
PLAN = flags.DEFINE_multi_string('plan', [], 'Say what this device would need, and do not train.')
EVALUATE = flags.DEFINE_string('evaluate', '', 'Measure this run or checkpoint, and do not train.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of a pod or cluster.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0; default: found.')
PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes; default: found.')
PROCESS = flags.DEFINE_integer('process', None, 'Index of this process; default: found.')
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where a refused input was found.')


def main():
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  config = CONFIG.value
  if PLAN.value:
    title = f'Memory of one training step of {run_name(command.config_file())}'
    found, errors = try_plan(config, PLAN.value)
    if found:
      show(found, title)
    if errors:
      raise ValueError('\n'.join(errors))  # What the other devices need was worth saying first.
    return
  if DISTRIBUTED.value or COORDINATOR.value:
    if config and config.cpu_devices:  # Many processes on a machine without an accelerator.
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  if EVALUATE.value:
    report = tasks.evaluate_folder(EVALUATE.value, config=config, directory=WORKDIR.value or None)
    print(tasks.show(report))
    return
  train(config, WORKDIR.value or os.path.join('runs', run_name(command.config_file())))


if __name__ == '__main__':
  app.run(
    lambda argv: command.run('run.py', main, TRACEBACK.value),
    flags_parser=command.parser('run.py', CONFIG, lambda: bool(EVALUATE.value)),
  )
