"""Methods that live in adapted weights over time: LoRA and what grew from it.

A method is a `Spec`, a frozen dataclass of numbers and words: `attach` asks it for the leaf that
stands for a matrix, and what it does between updates is its `advance`, which gives noise, or its
`restart`, which merges or switches.
"""

import dataclasses
from collections.abc import Mapping

from memjax.adapters.attach import Spec, attach, chosen, with_factors
from memjax.adapters.dora import DoRA
from memjax.adapters.flat_lora import FlatLoRA
from memjax.adapters.lora import LoRA
from memjax.adapters.melora import MELoRA
from memjax.adapters.merge import detach, fold, merge
from memjax.adapters.noise import at_rest, with_keys
from memjax.adapters.over_time import over_time
from memjax.adapters.pc_lora import PCLoRA, compressed, distilled
from memjax.adapters.peft import check_peft, load_peft, open_peft, save_peft
from memjax.adapters.products import load_products, save_products
from memjax.adapters.rates import labels, lora_plus, optimizer_of
from memjax.adapters.relora import ReLoRA, relora
from memjax.adapters.rso import RSO
from memjax.adapters.sora import SoRA, ranks
from memjax.adapters.switchlora import SwitchLoRA
from memjax.weights import replaced
from memjax.weights import trained as trainable

__all__ = [
  'ADAPTERS',
  'RSO',
  'DoRA',
  'FlatLoRA',
  'LoRA',
  'MELoRA',
  'PCLoRA',
  'ReLoRA',
  'SoRA',
  'Spec',
  'SwitchLoRA',
  'arguments',
  'at_rest',
  'attach',
  'check_peft',
  'chosen',
  'compressed',
  'detach',
  'distilled',
  'fold',
  'labels',
  'load_peft',
  'load_products',
  'lora_plus',
  'merge',
  'open_peft',
  'optimizer_of',
  'over_time',
  'ranks',
  'relora',
  'replaced',
  'save_peft',
  'save_products',
  'specification',
  'trainable',
  'with_factors',
  'with_keys',
]

# Name in a config -> specification; 'none' is none.
ADAPTERS = {
  'none': None,
  'dora': DoRA,
  'flat_lora': FlatLoRA,
  'lora': LoRA,
  'melora': MELoRA,
  'pc_lora': PCLoRA,
  'relora': ReLoRA,
  'rso': RSO,
  'sora': SoRA,
  'switchlora': SwitchLoRA,
}

# Beside the arguments of an adapter, whichever it is; see `memjax.peft_folder`.
OF_RUN = {'load': '', 'export': False, 'leaves': {}}


def arguments(name: str) -> dict:
  """Returns the arguments of an adapter that a config may hold, with their defaults."""
  fields = dataclasses.fields(ADAPTERS[name] or LoRA)
  known = {f.name: f.default for f in fields} | {'rank': 8}
  few = ('rank', 'alpha', 'targets', 'rest')
  return (known if name != 'none' else {k: known[k] for k in few}) | OF_RUN


def specification(name: str, fields: Mapping):
  """Returns the specification of an adapter with those of its arguments that `fields` has."""
  known = {f.name for f in dataclasses.fields(ADAPTERS[name])}
  return ADAPTERS[name](**{k: v for k, v in ({'rank': 8} | dict(fields)).items() if k in known})
