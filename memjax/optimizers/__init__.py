"""Ready optimizers by name, with arguments that a config can hold: numbers and words.

Every factory takes `learning_rate` (a number or a schedule) and returns an
`optax.GradientTransformation` whose updates are added to the parameters; what the model and the
mesh say, `head_dim` and `layout` (see `memjax.sharding.layout`), is taken by keyword alone. State
is f32 whatever the dtype of the parameters. Notebooks call the functions of `memjax` and `optax`
themselves.
"""

import inspect

from memjax.optimizers.dense import adam_mini, adamw, lion, muon, sgd, vector_adam
from memjax.optimizers.factored import adafactor, adalomo, came, galore_adafactor, sm3
from memjax.optimizers.low_rank import BASES, apollo, apollo_mini, fira, galore, golore, q_galore
from memjax.optimizers.masks import is_target
from memjax.optimizers.quantised import (
  adam4bit,
  adamw8bit,
  apollo_mini8bit,
  galore8bit,
  lion8bit,
  q_galore8bit,
)
from memjax.optimizers.zeroth_order import (
  forward_gradient,
  lozo,
  lozo_m,
  mezo,
  mezo_adam,
  mezo_momentum,
  subzero,
  zo_adam,
  zo_sgd_conservative,
  zo_sgd_sign,
)

__all__ = [
  'BASES',
  'OPTIMIZERS',
  'REQUIRED',
  'ZEROTH_ORDER',
  'ZEROTH_ORDER_STEPS',
  'arguments',
  'is_target',
]

OPTIMIZERS = {
  'adafactor': adafactor,
  'adalomo': adalomo,
  'adam4bit': adam4bit,
  'adam_mini': adam_mini,
  'adamw': adamw,
  'adamw8bit': adamw8bit,
  'apollo': apollo,
  'apollo_mini': apollo_mini,
  'apollo_mini8bit': apollo_mini8bit,
  'came': came,
  'fira': fira,
  'galore': galore,
  'galore8bit': galore8bit,
  'galore_adafactor': galore_adafactor,
  'golore': golore,
  'lion': lion,
  'lion8bit': lion8bit,
  'muon': muon,
  'q_galore': q_galore,
  'q_galore8bit': q_galore8bit,
  'sgd': sgd,
  'sm3': sm3,
  'vector_adam': vector_adam,
}

# Those that take values of the loss in place of a gradient, in the steps that give them values.
ZEROTH_ORDER = {
  'forward_gradient': forward_gradient,
  'lozo': lozo,
  'lozo_m': lozo_m,
  'mezo': mezo,
  'mezo_adam': mezo_adam,
  'mezo_momentum': mezo_momentum,
  'subzero': subzero,
  'zo_adam': zo_adam,
  'zo_sgd_conservative': zo_sgd_conservative,
  'zo_sgd_sign': zo_sgd_sign,
}
ZEROTH_ORDER_STEPS = ('zeroth_order', 'hybrid', 'streamed')  # Values of config.step.

REQUIRED = inspect.Parameter.empty  # Default of an argument that has none.


def arguments(name):
  """Returns the arguments of an optimizer that a config may hold, with their defaults."""
  parameters = inspect.signature((OPTIMIZERS | ZEROTH_ORDER)[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
