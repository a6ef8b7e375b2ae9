r"""LLaMA 7B over the memory of four devices, and LoRA of rank 16 on its queries and values.

    python run.py --config=configs/lora_llama7b_tp.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. The choices of JORA (arXiv 2403.11366), which publishes 23.1, 16.1
and 11.5 GB a card on 1, 2 and 4 cards: alpha 16, learning rate 1e-4 with a linear warm-up, updates
of 8 sequences of at most 2000 tokens. More devices than four take shares of the batch.
"""

from memjax import recipes
from memjax.config import adapter, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, tensor=4)
  c = recipes.lora_llama7b(arg.smoke)
  c.steps = 4 if arg.smoke else 1000
  c.batch_size = 8
  c.accumulate = 4
  c.schedule.warmup_ratio = 0.1
  c.adapter = adapter('lora', rank=4 if arg.smoke else 16, alpha=16, targets='attn/(q|v)/')
  c.mesh.tensor = 1 if arg.smoke else arg.tensor
  return c
