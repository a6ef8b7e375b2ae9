"""LLaMA 60M with GaLore, rank 128: 10,000 updates of 131,072 tokens (1.3 B in all).

    python run.py --config=configs/galore_llama60m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 34.88, full rank 34.06.
"""

import llama_c4


def get_config(arg=''):
  return llama_c4.galore('60m', arg)
