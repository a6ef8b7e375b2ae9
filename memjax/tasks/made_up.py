"""Rows made up on the spot, so that a task can be tried before its files are there.

The label can be read off one word, which a small model learns in a few hundred updates.
"""

from collections.abc import Iterator

from memjax.tasks.task import Task

CLUES = ('red', 'blue', 'green', 'white', 'black', 'brown')


def rows(task: Task, scheme: str) -> Iterator[tuple[str, dict]]:
  """Yields rows of 'made_up:COUNT' or 'made_up:COUNT:START', in the task's own fields.

  Raises:
    ValueError: for another scheme.
  """
  numbers = scheme.split(':')[1:]
  if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
    raise ValueError(f"{scheme!r}: write 'made_up:COUNT', as in 'made_up:64', or with ':START'")
  count, start = int(numbers[0]), int(numbers[-1]) if len(numbers) == 2 else 0
  for i in range(start, start + count):
    yield f'{scheme}, row {i}', row(task, i)


def row(task: Task, i: int) -> dict:
  """Returns made-up row `i` of a task."""
  labels = len(task.words) or 2
  # Counting labels off would give every batch of a file's order the same ones.
  label = (i * 7 + i // labels) % labels
  clue = CLUES[label % len(CLUES)]
  fields = dict.fromkeys((*task.fields(), *task.texts), f'{clue} no {i}') | {'group': i // 2}
  if task.kind == 'choice':
    names = CLUES[:2]
    options = tuple(f' {name}' for name in names)
    return fields | {'options': options, 'names': names, task.label: (label % 2,)}
  if task.kind == 'generation':
    answer = [clue] if task.label == 'answers' else clue
    return fields | {task.label: answer, 'source': f'source {i % 2}'}
  return fields | {task.label: float(label) if task.kind == 'regression' else label}
