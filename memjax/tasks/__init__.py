"""Labelled tasks: prompts, protocols, option scoring, answers and the scores papers report.

>>> from memjax import tasks
>>> task = tasks.find('rte')
>>> row = {'premise': 'Rome fell.', 'hypothesis': 'Rome stands.', 'label': 'not_entailment'}
>>> example = tasks.example(task, row, 'row 1')
>>> print(example.prompt + example.options[example.label])
Rome fell.
Does this mean that "Rome stands." is true? Yes or No?
No
"""

from memjax.tasks.evaluation import measure, predict
from memjax.tasks.loading import (
  TaskData,
  check_model,
  choosing,
  head_fields,
  load,
  load_test,
  resolve,
)
from memjax.tasks.metrics import METRICS
from memjax.tasks.report import evaluate_folder, show
from memjax.tasks.rows import read
from memjax.tasks.sampling import K_SHOT_SEEDS
from memjax.tasks.tables import TASKS, find
from memjax.tasks.task import Example, Task, example

__all__ = [
  'K_SHOT_SEEDS',
  'METRICS',
  'TASKS',
  'Example',
  'Task',
  'TaskData',
  'check_model',
  'choosing',
  'evaluate_folder',
  'example',
  'find',
  'head_fields',
  'load',
  'load_test',
  'measure',
  'predict',
  'read',
  'resolve',
  'show',
]
