"""LLaMA 130M with full-rank AdamW: 20,000 updates of 131,072 tokens (2.6 B in all).

    python run.py --config=configs/adamw_llama130m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 25.08.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.adamw_llama('130m', arg)
