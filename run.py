"""Trains a model from a config file: `python run.py --config=configs/quickstart.py`.

The same command resumes. `:smoke` after the file name runs it in seconds on a CPU, and
`--config.field=value` changes a field. On a pod, start the same command with `--distributed` on
every host.
"""

import os
import signal

# Until training starts there is nothing to save; sys.exit could be swallowed by an import.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from memjax.config import check_field, load, run_name  # noqa: E402
from memjax.train import train  # noqa: E402

CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, then :arguments.')
WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run writes; default runs/<config>.')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of a pod or cluster.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0; default: found.')
PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes; default: found.')
PROCESS = flags.DEFINE_integer('process', None, 'Index of this process; default: found.')
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where a refused input was found.')


def main(argv):
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  if len(argv) > 1:
    raise ValueError(f'unknown argument {argv[1]!r}; options begin with --')
  config = CONFIG.value
  file = config_flags.get_config_filename(flags.FLAGS['config'])
  workdir = WORKDIR.value or os.path.join('runs', run_name(file))
  if DISTRIBUTED.value or COORDINATOR.value:
    if config.cpu_devices:  # Many processes on a machine without an accelerator.
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  train(config, workdir)


def parse_flags(argv):
  """Parses the command line; what is wrong with it is one sentence, not a traceback."""
  try:
    remaining = flags.FLAGS(argv)
    if CONFIG.value is None:
      raise SystemExit('run.py: say which experiment, as --config=configs/quickstart.py')
    CONFIG.value.to_dict()  # A config file that could not be read shows here.
    return remaining
  except (flags.Error, AttributeError, KeyError, OSError) as e:
    error = e
  options = dict(arg.lstrip('-').partition('=')[::2] for arg in argv[1:])
  try:  # Our own reading of the same says it better.
    config = load(options['config']) if options.get('config') else None
    for name in options:
      if config and name.startswith('config.'):
        check_field(config, name.partition('.')[2])
  except ValueError as e:
    error = e
  raise SystemExit(f'run.py: {error}')


def run(argv):
  """Runs `main`; a refused input is one sentence, not a traceback."""
  try:
    main(argv)
  except (ValueError, FloatingPointError) as e:
    if TRACEBACK.value:
      raise
    raise SystemExit(f'run.py: {e}\n(--traceback shows where this was found)') from None


if __name__ == '__main__':
  app.run(run, flags_parser=parse_flags)
