"""LLaMA 7B fine-tuned in full with MeZO: 20,000 updates of two forward passes, 16 sequences each.

    python run.py --config=configs/mezo_llama7b.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. Published for OPT (arXiv 2305.17333, tables 15 and 16): batch 16,
20,000 steps, constant learning rate 1e-6 or 1e-7, eps 1e-3, no weight decay; memory of inference.
Here the weights are bfloat16, rounded stochastically. The log in the checkpoint, 160 kB, makes the
fine-tuned weights again from those that the run began with; see `memjax.replay`.
"""

from memjax import recipes
from memjax.config import optimizer, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, noise='gaussian')
  c = recipes.llama_zeroth_order(arg.smoke)
  c.optimizer = optimizer('mezo', learning_rate=1e-6, eps=1e-3, noise=arg.noise, log_steps=c.steps)
  return c
