"""What a parameter leaf can be besides an array.

A model never reads a parameter: it asks for `dot`, `take` or `materialize`. So a leaf may be
low-rank-adapted, quantised, perturbed or offloaded, leaves nest, and no model changes.
"""

from memjax.weights.adapted import Adapted, Restarted, in_part
from memjax.weights.dora import DoRA
from memjax.weights.drawn import Drawn
from memjax.weights.frozen import Frozen, spread
from memjax.weights.int8 import Int8, dense, quantise
from memjax.weights.nf4 import NF4, quantise_nf4
from memjax.weights.offloaded import Offloaded, offloaded
from memjax.weights.perturbed import LowRank, Perturbed
from memjax.weights.switched import Switched
from memjax.weights.trained import replaced, trained
from memjax.weights.variants import BlockDiagonal, Fading, Flat, Gated, Product
from memjax.weights.weight import Weight, dot, is_weight, materialize, take, whole

__all__ = [
  'NF4',
  'Adapted',
  'BlockDiagonal',
  'DoRA',
  'Drawn',
  'Fading',
  'Flat',
  'Frozen',
  'Gated',
  'Int8',
  'LowRank',
  'Offloaded',
  'Perturbed',
  'Product',
  'Restarted',
  'Switched',
  'Weight',
  'dense',
  'dot',
  'in_part',
  'is_weight',
  'materialize',
  'offloaded',
  'quantise',
  'quantise_nf4',
  'replaced',
  'spread',
  'take',
  'trained',
  'whole',
]
