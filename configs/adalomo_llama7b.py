r"""LLaMA 7B with AdaLomo, layer by layer: factored second moments, no clipping by a global norm.
150,000 updates.

    python run.py --config=configs/adalomo_llama7b.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Published for further pre-training of LLaMA 7B: the learning
rate and 3 % warm-up; no perplexity on C4 from scratch.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('adalomo', arg)
