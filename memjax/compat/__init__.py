"""Official packages' optimizers, by their own argument names and with their quirks.

For reproducing published runs; `memjax.transforms` holds the methods as intended. Each docstring
names every quirk that it reproduces and every one that it leaves out.
"""

from memjax.compat.adam_mini import adam_mini
from memjax.compat.apollo_torch import apollo_adamw
from memjax.compat.bitsandbytes import adamw8bit
from memjax.compat.came_pytorch import came
from memjax.compat.colm import colm
from memjax.compat.fira import fira_adamw
from memjax.compat.galore_adafactor import galore_adafactor
from memjax.compat.galore_torch import galore_adamw
from memjax.compat.galore_torch_8bit import galore_adamw8bit
from memjax.compat.lomo_optim import adalomo, lomo
from memjax.compat.q_galore_torch import q_galore_adamw8bit
from memjax.compat.relora import relora
from memjax.compat.sora import sora_threshold
from memjax.compat.torchao import adamw8bit_ao
from memjax.compat.transformers_adafactor import adafactor

__all__ = [
  'adafactor',
  'adalomo',
  'adam_mini',
  'adamw8bit',
  'adamw8bit_ao',
  'apollo_adamw',
  'came',
  'colm',
  'fira_adamw',
  'galore_adafactor',
  'galore_adamw',
  'galore_adamw8bit',
  'lomo',
  'q_galore_adamw8bit',
  'relora',
  'sora_threshold',
]
