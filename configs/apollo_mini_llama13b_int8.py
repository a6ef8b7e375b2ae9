r"""LLaMA 13B with APOLLO-Mini, layer by layer, on weights in 8 bits: for one device of 16 GB.
150,000 updates.

    python run.py --config=configs/apollo_mini_llama13b_int8.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Published: pre-training 13B on one 80 GB card with 16-bit weights.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('apollo_mini', arg, size='13b', weights='int8')
