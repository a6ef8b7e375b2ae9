"""LLaMA 350M with SwitchLoRA, rank 256: 40,000 updates of 589,824 tokens (23.6 B in all).

    python run.py --config=configs/switchlora_llama350m.py

`:smoke` takes seconds on a CPU. Published validation perplexity on C4 (arXiv 2406.06564): 18.70, at
rank 128 19.96, LoRA 31.87, full rank 18.72.

The pools of candidates are 0.96 GB, beside matrices of 0.6; `:pool=host` keeps them in the host's
memory, and `:pool=keys` draws candidates as they come and keeps none.
"""

from memjax import recipes
from memjax.config import adapter, optimizer, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, rank=256, pool='device')
  c = recipes.llama_c4('350m', arg.smoke)
  c.steps = 4 if arg.smoke else 40_000
  c.batch_size = 16 if arg.smoke else 1152
  c.accumulate = 2 if arg.smoke else 8
  c.seq_len = 32 if arg.smoke else 512
  c.clip_norm = 1.0
  c.optimizer = optimizer('vector_adam', learning_rate=0.02)
  rank = min(arg.rank, 8) if arg.smoke else arg.rank
  c.adapter = adapter('switchlora', rank=rank, pool=arg.pool, descent=c.steps // 10 or 1)
  c.schedule.warmup_ratio = 100 / 40_000
  c.schedule.final_ratio = 0.0
  return c
