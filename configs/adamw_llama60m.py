"""LLaMA 60M with full-rank AdamW: 10,000 updates of 131,072 tokens (1.3 B in all).

    python run.py --config=configs/adamw_llama60m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 34.06.
"""

import llama_c4


def get_config(arg=''):
  return llama_c4.adamw('60m', arg)
