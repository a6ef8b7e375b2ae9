r"""LLaMA 7B held in 4 bits, and LoRA of rank 16 trained beside every matrix of its layers.

    python run.py --config=configs/qlora_llama7b.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. Published (arXiv 2305.14314, appendix B.2, Guanaco 7B): updates of
16 sequences at a constant learning rate of 2e-4 for 1,875 updates, gradients clipped at 0.3, alpha
16, dropout 0.1, rank 64. Factors are f32 beside bfloat16 arithmetic; with a micro-batch of one
sequence of 2048 tokens it fits a card of 8 GB, and no moments need to be paged.
"""

from memjax import recipes
from memjax.config import adapter, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, rank=16)
  c = recipes.lora_llama7b(arg.smoke)
  c.weights = 'nf4'
  c.steps = 4 if arg.smoke else 1875
  c.batch_size = 2 if arg.smoke else 16
  c.accumulate = 2 if arg.smoke else 16
  c.clip_norm = 0.3
  c.optimizer.learning_rate = 2e-4
  rank = min(arg.rank, 4) if arg.smoke else arg.rank
  c.adapter = adapter('lora', rank=rank, alpha=16, dropout=0.1, dtype='float32')
  return c
