"""The first run: a LLaMA of 10.5 M parameters on the Python sources that come with the interpreter,
no network needed.

    python run.py --config=configs/quickstart.py

Five minutes on two CPU cores, to a validation loss of 5.02. `:smoke` takes seconds. Other methods:
`:method=adamw`, `:method=adafactor`, `:method=galore_svd`; with `steps=1000,seq_len=64` the
validation loss ends at 4.13 nats a token for AdamW, 4.08 for GaLore, 4.09 with the exact SVD and
4.62 for Adafactor.
"""

from memjax.config import default, optimizer, parse_arg

METHODS = {
  'adafactor': dict(name='adafactor', learning_rate=0.01),
  'adamw': dict(name='adamw', learning_rate=0.01, scale=0.05),
  'galore': dict(name='galore', learning_rate=0.01, rank=64, refresh_every=50, scale=0.1),
  'galore_svd': dict(
    name='galore', learning_rate=0.01, rank=64, refresh_every=50, scale=0.1, basis='svd'
  ),
}


def get_config(arg=''):
  arg = parse_arg(arg, smoke=False, method='galore', steps=240, seq_len=128)
  if arg.method not in METHODS:
    raise ValueError(f'no method {arg.method!r}; there are {", ".join(METHODS)}')
  c = default()
  c.model = 'llama_tiny' if arg.smoke else 'llama_quickstart'
  c.steps = 4 if arg.smoke else arg.steps
  c.batch_size = 8
  c.seq_len = 32 if arg.smoke else arg.seq_len
  c.optimizer = optimizer(**METHODS[arg.method])
  if arg.smoke and 'rank' in c.optimizer:
    c.optimizer.rank, c.optimizer.refresh_every = 8, 2

  c.data.tokenizer = 'bytes' if arg.smoke else 'bpe'
  c.data.max_tokens = 200_000 if arg.smoke else 0
  c.log_every = 1 if arg.smoke else 10
  c.eval_every = 2 if arg.smoke else 100
  c.eval_tokens = 1024 if arg.smoke else 32_768
  c.checkpoint.every = 2 if arg.smoke else 100
  c.sample.tokens = 8 if arg.smoke else 64
  return c
