"""Models by name."""

from typing import Any

from memjax.models import presets
from memjax.models.bert import Bert
from memjax.models.gpt2 import GPT2
from memjax.models.llama import Llama
from memjax.models.opt import OPT
from memjax.models.phi import Phi
from memjax.models.stacked import Stacked, check_fields
from memjax.naming import nearest

# Name -> model family, and the fields that make the size.
FAMILIES = (
  (Llama, presets.LLAMA),
  (OPT, presets.OPT),
  (GPT2, presets.GPT2),
  (Phi, presets.PHI),
  (Bert, presets.BERT),
)
PRESETS = {name: (family, fields) for family, table in FAMILIES for name, fields in table.items()}


def create(name: str, **overrides: Any) -> Stacked:
  """Returns the model called `name`, a description that allocates nothing.

  Args:
    name: A key of `PRESETS`.
    **overrides: Fields of the model to set or change, such as `dtype='bfloat16'` or `layers=2`.

  Raises:
    ValueError: for an unknown name or field, naming the nearest known one.

  >>> create('llama_7b', dtype='bfloat16').num_params()
  6738415616
  """
  if name not in PRESETS:
    raise ValueError(f'no model is called {name!r}; {nearest(name, PRESETS)}')
  family, fields = PRESETS[name]
  check_fields(family, overrides)
  return family(**{**fields, **overrides})
