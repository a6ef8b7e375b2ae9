"""LLaMA 350M with full-rank AdamW: 60,000 updates of 131,072 tokens (7.9 B in all).

    python run.py --config=configs/adamw_llama350m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 18.80.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.adamw_llama('350m', arg)
