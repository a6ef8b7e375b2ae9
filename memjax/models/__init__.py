"""Language models as pure functions of a plain dict of parameters."""

from memjax.models.create import PRESETS, create
from memjax.models.llama import Llama

__all__ = ['PRESETS', 'Llama', 'create']
