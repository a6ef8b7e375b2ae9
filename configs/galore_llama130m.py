"""LLaMA 130M with GaLore, rank 256: 20,000 updates of 131,072 tokens (2.6 B in all).

    python run.py --config=configs/galore_llama130m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 25.36, full rank 25.08.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.galore_llama('130m', arg)
