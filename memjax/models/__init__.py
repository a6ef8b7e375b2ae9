"""Language models as pure functions of a plain dict of parameters."""

from memjax.models.create import PRESETS, create
from memjax.models.llama import Llama
from memjax.models.opt import OPT

__all__ = ['OPT', 'PRESETS', 'Llama', 'create']
