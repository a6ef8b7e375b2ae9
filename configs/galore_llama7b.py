"""LLaMA 7B with GaLore, rank 1024: 150,000 updates of 131,072 tokens (19.7 B in all).

    python run.py --config=configs/galore_llama7b.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4: 14.65, full rank 14.61 (both
published with 8-bit states; f32 here).
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.galore_llama('7b', arg)
