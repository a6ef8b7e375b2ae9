"""Command lines that take a config: what is wrong with one is a sentence, not a traceback."""

from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from memjax.config import check_field, load


def parser(program: str, config, optional: Callable[[], bool] = lambda: False):
  """Returns a flags parser for `absl.app.run`.

  Args:
    program: What the command is called in its messages.
    config: Holder of its `--config` flag.
    optional: Says, once flags are parsed, whether this command line needs no config.
  """

  def parse(argv):
    try:
      remaining = flags.FLAGS(argv)
      if config.value is not None:
        config.value.to_dict()  # A config file that could not be read shows here.
      elif not optional():
        raise SystemExit(f'{program}: say which experiment, as --config=configs/quickstart.py')
      if len(remaining) > 1:
        raise SystemExit(f'{program}: unknown argument {remaining[1]!r}; options begin with --')
      return remaining
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as e:
      raise SystemExit(f'{program}: {_say_better(argv) or e}') from None

  return parse


def run(program: str, main: Callable[[], None], traceback: bool = False) -> None:
  """Calls `main`; a refused input is one sentence and exit code 1, with `traceback` an error.

  Ctrl-C gives exit code 130, as shells expect, so that a script does not go on.
  """
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
  except (ValueError, FloatingPointError, OSError) as e:
    if traceback:
      raise
    raise SystemExit(f'{program}: {e}\n(--traceback shows where this was found)') from None


def config_file() -> str:
  """Returns the config file of the command line, with its arguments."""
  return config_flags.get_config_filename(flags.FLAGS['config'])


def _say_better(argv) -> str | None:
  """Our own sentence on what is wrong with a config or a field of it, if that is it."""
  options = {}
  for word, after in zip(argv[1:], [*argv[2:], '']):
    name, equals, value = word.lstrip('-').partition('=')
    options[name] = value if equals else after  # `--name=value` or `--name value`.
  try:
    config = load(options['config']) if options.get('config') else None
    for name in options:
      if config and name.startswith('config.'):
        check_field(config, name.partition('.')[2])
  except ValueError as e:
    return str(e)
  return None
