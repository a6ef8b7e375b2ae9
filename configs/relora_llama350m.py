r"""LLaMA 350M with ReLoRA, rank 128: 15,000 updates of 589,824 tokens after 5,000 of all weights.

    python run.py --config=configs/relora_llama350m.py:warm=runs/full/checkpoints/5000

`:smoke` takes seconds on a CPU. Published validation perplexity on C4 (arXiv 2307.05695): 19.32,
full rank 18.66, LoRA after the same warm start 19.73, without one 57.11.

The first 5,000 updates are a run of their own, whose memory Adam's moments of all weights fill:

    python run.py --config=configs/adamw_llama350m.py --config.steps=20000 \
        --config.batch_size=1152 --config.accumulate=8 --config.seq_len=512 \
        --config.checkpoint.keep_every=5000 --workdir=runs/full

stopped after 5,000. Its weights are read alone, its moments are not. Without `warm`, all 20,000
updates are of low rank, as in the paper's ablation.
"""

from memjax import recipes, run_folder
from memjax.config import adapter, optimizer, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, rank=128, warm='')
  c = recipes.llama_c4('350m', arg.smoke)
  every, warmup = (2, 1) if arg.smoke else (5000, 500)
  c.load = run_folder.full_rank(arg.warm, c.model)
  c.steps = 4 if arg.smoke else 15_000 if arg.warm else 20_000
  c.batch_size = 16 if arg.smoke else 1152
  c.accumulate = 2 if arg.smoke else 8
  c.seq_len = 32 if arg.smoke else 512
  c.clip_norm = 1.0
  c.optimizer = optimizer('adamw', learning_rate=1e-3)
  rank = min(arg.rank, 8) if arg.smoke else arg.rank
  c.adapter = adapter('relora', rank=rank, alpha=32, every=every, dropout=0.1)
  c.schedule.name = 'jagged'
  c.schedule.warmup_ratio = warmup / c.steps
  c.schedule.restart_every = every
  c.schedule.restart_warmup = 1 if arg.smoke else 100
  return c
