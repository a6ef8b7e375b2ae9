"""Models by name."""

import dataclasses
from typing import Any

from memjax.models import presets
from memjax.models.llama import Llama
from memjax.models.opt import OPT
from memjax.naming import nearest

# Name -> model family, and the fields that make the size.
PRESETS = {
  **{name: (Llama, fields) for name, fields in presets.LLAMA.items()},
  **{name: (OPT, fields) for name, fields in presets.OPT.items()},
}


def create(name: str, **overrides: Any) -> Llama | OPT:
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
  known = [field.name for field in dataclasses.fields(family)]
  for override in overrides:
    if override not in known:
      raise ValueError(f'{family.__name__} has no field {override!r}; {nearest(override, known)}')
  return family(**{**fields, **overrides})
