r"""LLaMA 7B with 8-bit GaLore, rank 1024, layer by layer: bf16 weights, 8-bit moments and bases;
150,000 updates.

    python run.py --config=configs/galore8bit_llama7b.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Published, with updates of 512 sequences of 256 tokens: validation
perplexity 14.65 on C4 (full rank 14.61), 22.72 GB on one card at batch 1, its bases in bf16.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('galore8bit', arg)
