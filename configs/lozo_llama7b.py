"""LLaMA 7B fine-tuned in full with LOZO: noise of rank 2, one factor of which is kept for 50 steps.

    python run.py --config=configs/lozo_llama7b.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. The authors' search (arXiv 2410.07698): learning rate 1e-6 or 1e-7,
eps 1e-3, rank 1 or 2, 50 or 100 steps between factors; batch 16, 20,000 steps. Their code does not
divide the update by the rank, hence `scale='code'` with their learning rate.
"""

from memjax import recipes
from memjax.config import optimizer, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, rank=2)
  c = recipes.llama_zeroth_order(arg.smoke)
  c.optimizer = optimizer(
    'lozo',
    learning_rate=1e-6,
    rank=arg.rank,
    eps=1e-3,
    refresh_every=50,
    scale='code',
    log_steps=c.steps,
  )
  return c
