"""LLaMA 60M with full-rank AdamW: 10,000 updates of 131,072 tokens (1.3 B in all).

    python run.py --config=configs/adamw_llama60m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 34.06.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.adamw_llama('60m', arg)
