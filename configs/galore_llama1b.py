"""LLaMA 1B with GaLore, rank 512: 100,000 updates of 131,072 tokens (13.1 B in all).

    python run.py --config=configs/galore_llama1b.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 15.64, full rank 15.56.

The paper's headline is rank 512; the official script runs `:rank=1024`.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.galore_llama('1b', arg)
