r"""LLaMA 7B with APOLLO-Mini, layer by layer, on bf16 weights;
`:weights=int8` keeps 8 bits of them. 150,000 updates.

    python run.py --config=configs/apollo_mini_llama7b.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Published, with updates of 512 sequences of 256 tokens: validation
perplexity 13.09 on C4 (8-bit Adam 14.61), under 12 GB with weights in 8 bits.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('apollo_mini', arg)
