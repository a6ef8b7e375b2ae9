"""LLaMA 350M with GaLore, rank 256: 60,000 updates of 131,072 tokens (7.9 B in all).

    python run.py --config=configs/galore_llama350m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 18.95, full rank 18.80.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.galore_llama('350m', arg)
