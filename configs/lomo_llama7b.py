r"""LLaMA 7B with LOMO, layer by layer: gradient descent without optimizer state. 150,000 updates.

    python run.py --config=configs/lomo_llama7b.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Clipping by the norm of all gradients takes a second backward pass,
as in the official package. Published for fine-tuning LLaMA 7B: 14.58 GB and the learning rate;
descent without adaptation is no match for Adam from scratch.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('lomo', arg)
