"""Language models as pure functions of a plain dict of parameters."""

from memjax.models.bert import Bert
from memjax.models.create import PRESETS, create
from memjax.models.gpt2 import GPT2
from memjax.models.huggingface import load, save
from memjax.models.llama import Llama
from memjax.models.opt import OPT
from memjax.models.phi import Phi

__all__ = ['GPT2', 'OPT', 'PRESETS', 'Bert', 'Llama', 'Phi', 'create', 'load', 'save']
