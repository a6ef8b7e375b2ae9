"""Loss to gradient without backpropagation: estimates from a few forward passes.

An estimator is an optax transform that ignores the gradient it is given and hands on an estimate
of it, made by `update(_, state, params, value_fn=...)` from values of the function on perturbed
parameters. Everything behind it in a chain treats that like a gradient. Estimators here have no
learning rate; the optimizers of the same names, with one, are in `memjax`.
"""

from memjax.estimators.estimator import EstimatorState as EstimatorState
from memjax.estimators.estimator import estimator as estimator
from memjax.estimators.estimator import find as find
from memjax.estimators.log import Log as Log
from memjax.estimators.log import find_log as find_log
from memjax.estimators.log import load_log as load_log
from memjax.estimators.log import record as record
from memjax.estimators.log import save_log as save_log
from memjax.estimators.low_rank import lozo as lozo
from memjax.estimators.low_rank import subzero as subzero
from memjax.estimators.noise import Noise as Noise
from memjax.estimators.noise import gaussian as gaussian
from memjax.estimators.noise import rademacher as rademacher
from memjax.estimators.noise import sparse as sparse
from memjax.estimators.noise import sphere as sphere
from memjax.estimators.recomputed import scale_by_recomputed_adam as scale_by_recomputed_adam
from memjax.estimators.spsa import forward_gradient as forward_gradient
from memjax.estimators.spsa import spsa as spsa
