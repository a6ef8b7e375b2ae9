r"""LLaMA 7B with Q-GaLore, rank 1024, layer by layer: weights and moments in 8 bits, bases in 4;
150,000 updates.

    python run.py --config=configs/q_galore_llama7b.py \
        --config.batch_size=1 --config.accumulate=1

`:smoke` takes seconds on a CPU. Published, with updates of 512 sequences of 256 tokens: GaLore's
validation perplexity on C4 (14.65), 15.08 GB on one card at batch 1.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.layerwise_llama('q_galore', arg)
