"""LLaMA 60M with GaLore, rank 128: 10,000 updates of 131,072 tokens (1.3 B in all).

    python run.py --config=configs/galore_llama60m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 34.88, full rank 34.06.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.galore_llama('60m', arg)
