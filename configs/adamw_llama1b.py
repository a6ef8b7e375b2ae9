"""LLaMA 1B with full-rank AdamW: 100,000 updates of 131,072 tokens (13.1 B in all).

    python run.py --config=configs/adamw_llama1b.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 15.56.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.adamw_llama('1b', arg)
