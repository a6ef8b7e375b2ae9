"""Says what a run needs on devices one need not own.

    python -m memjax.plan --config=configs/galore_llama7b.py --target=v5e:1x1 --target=rtx4090

`--config.field=value` changes a field, as for `run.py`. `--search=batch` finds the largest batch
that fits each target, `--recommend` compares methods, rematerialisation and precisions.
"""

import contextlib
import json
import pathlib

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memjax import command
from memjax.config import run_name
from memjax.plan import draw, recommend, search, targets
from memjax.plan.planning import try_plan
from memjax.plan.receipt import GIB, show

CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, then :arguments.')
TARGET = flags.DEFINE_multi_string('target', [], 'As v5e:2x2, rtx4090, h100-80g*8 or local.')
JSON = flags.DEFINE_string('json', '', 'File to write the receipts to.')
PLOT = flags.DEFINE_string('plot', '', 'Picture to write: parts of each target, or the trade.')
LIST = flags.DEFINE_bool('list-targets', False, 'List the targets; cards.json says whence.')
SEARCH = flags.DEFINE_enum('search', None, ['batch'], 'Find the largest that fits.')
RECOMMEND = flags.DEFINE_bool('recommend', False, 'Compare methods and ways for each target.')
COMPILES = flags.DEFINE_integer(
  'compiles', recommend.COMPILES, 'Combinations that --recommend compiles, at most.', lower_bound=1
)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where a refused input was found.')


def main() -> None:
  """Answers one command line."""
  say = Console(highlight=False, soft_wrap=True).print
  if LIST.value:
    say(list_targets())
    return
  if SEARCH.value and RECOMMEND.value:
    raise ValueError('--search and --recommend are two questions; ask one at a time')
  if not TARGET.value:
    raise ValueError('say which device, as --target=v5e:1x1; --list-targets shows them')
  for file in filter(None, (JSON.value, PLOT.value)):
    if not pathlib.Path(file).parent.is_dir():
      raise ValueError(f'{file}: there is no folder {str(pathlib.Path(file).parent)!r}')
  if PLOT.value:
    draw.check_file(PLOT.value)
  config, name = CONFIG.value, run_name(command.config_file())
  if SEARCH.value:
    found, errors = each_target(lambda target: [search_batch(config, target, say)])
  elif RECOMMEND.value:
    found, errors = each_target(lambda target: compare(config, target, name, say))
  else:
    with progress('compiling', len(TARGET.value)) as tried:
      found, errors = try_plan(config, TARGET.value, on_done=tried)
    if found:
      show(found, f'Memory of one training step of {name}')
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(found, indent=2) + '\n')
  if PLOT.value and found:
    plot(found)
  if errors:
    raise ValueError('\n'.join(errors))  # What the other targets need was worth saying first.


def each_target(answer) -> tuple[list[dict], list[str]]:
  """Returns what `answer` found for each target, and a sentence for each that has no answer."""
  found, errors = [], []
  for target in TARGET.value:
    try:
      found += answer(target)
    except ValueError as e:
      errors.append(str(e))
  return found, errors


def search_batch(config, target: str, say) -> dict:
  """Finds the largest batch that fits one target; returns its receipt, `batch_size` added."""

  def tried(batch_size, sentence):
    say(f'batch {batch_size:,}  {escape(sentence)}')

  batch_size, found = search.largest_batch(config, target, say=tried)
  if batch_size:
    say(f'[bold]{escape(target)}: the largest batch is {batch_size:,}[/]')
    say(f'  --config.batch_size={batch_size}')
  else:
    say(f'[bold]{escape(target)}: no batch fits, not even the smallest[/]; see --recommend')
  for note in found['notes']:
    say(f'  {escape(note)}')
  return found | {'batch_size': batch_size}


def compare(config, target: str, name: str, say) -> list[dict]:
  """Compares methods and ways for one target; returns the rows, `target` added."""
  with progress(f'compiling for {target}') as tried:
    rows, failed, total = recommend.recommend(
      config, target, compiles=COMPILES.value, on_done=tried
    )
  batch = f'{config.batch_size} x {config.seq_len} tokens, {config.accumulate} micro-batches'
  say(recommend.table(rows, f'{escape(name)} on {escape(target)}, {batch}'))
  say(
    'work: operations of one update, relative to AdamW without rematerialisation; counted from the '
    'trace'
  )
  for error, combinations in failed.items():
    say(f'not compiled: {escape(", ".join(combinations))}: {escape(error)}')
  if COMPILES.value < total:
    say(f'{COMPILES.value} of {total} combinations were tried; --compiles={total} tries all')
  return [{'target': target} | row for row in rows]


def plot(found: list[dict]) -> None:
  """Draws the answers: of a plan side by side, else a picture a target."""
  if not (SEARCH.value or RECOMMEND.value):
    draw.bars(found, PLOT.value)
    return
  picture = draw.trade if RECOMMEND.value else draw.bars
  for target in dict.fromkeys(one['target'] for one in found):
    rows = [one for one in found if one['target'] == target]
    picture(rows, _for_target(PLOT.value, target))


@contextlib.contextmanager
def progress(words: str, total: int | None = None):
  """Shows on a terminal how many compiles are done; yields what to call after each."""
  console = Console(stderr=True, highlight=False)
  done = 0

  def tried(index, report):
    nonlocal done
    done += 1
    status.update(f'{words}, {done}{f" of {total}" if total else ""} done')

  with console.status(words) as status:
    yield tried


def list_targets() -> Table:
  """Returns the kinds of devices as a table."""
  out = Table(title='Targets', title_justify='left')
  for column in ('target', 'platform', 'devices', 'GiB a device'):
    out.add_column(column, justify='left' if column in ('target', 'platform') else 'right')
  for row in targets.known():
    limit = f'{row["limit_bytes"] / GIB:.2f}'
    out.add_row(row['name'], row['platform'], str(row['devices']), limit)
  out.caption = 'Any slice, as v5e:4x4; any number of cards in a host, as h100-80g*8; or local'
  return out


def _for_target(file: str, target: str) -> str:
  """Returns a name for the picture of one target among several."""
  if len(TARGET.value) == 1:
    return file
  path = pathlib.Path(file)
  return str(
    path.with_name(f'{path.stem}-{target.replace(":", "-").replace("*", "x")}{path.suffix}')
  )


if __name__ == '__main__':
  app.run(
    lambda argv: command.run('memjax.plan', main, TRACEBACK.value),
    flags_parser=command.parser('memjax.plan', CONFIG, optional=lambda: LIST.value),
  )
