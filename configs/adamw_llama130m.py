"""LLaMA 130M with full-rank AdamW: 20,000 updates of 131,072 tokens (2.6 B in all).

    python run.py --config=configs/adamw_llama130m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 25.08.
"""

import llama_c4


def get_config(arg=''):
  return llama_c4.adamw('130m', arg)
