"""LLaMA 1B within random subspaces of rank 512: 100,000 updates of 131,072 tokens (13.1 B in all).

    python run.py --config=configs/rso_llama1b.py

`:smoke` takes seconds on a CPU. Validation perplexity on C4 as measured by the authors' later work:
15.72, GaLore 15.64, full rank 15.33; the paper (arXiv 2502.07222) prints neither the length of a
period nor its learning rate. Here a subspace lasts as long as GaLore's, and the learning rate is
Adam's, since updates of `P B` are of its size whatever the rank.
"""

from memjax import recipes
from memjax.config import adapter, optimizer, parse_arg


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, rank=512, every=200)
  c = recipes.llama_c4('1b', arg.smoke)
  c.optimizer = optimizer('vector_adam', learning_rate=recipes.LEARNING_RATES['1b'])
  rank, every = (min(arg.rank, 8), 2) if arg.smoke else (arg.rank, arg.every)
  c.adapter = adapter('rso', rank=rank, every=every)
  return c
