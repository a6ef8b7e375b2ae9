"""Checkpoint folders of the Hugging Face form: read into parameters, and written from them."""

from memjax.models.huggingface.read import describe, load, read_config
from memjax.models.huggingface.write import save

__all__ = ['describe', 'load', 'read_config', 'save']
