"""The first run: a LLaMA of 10.5 M parameters on the Python sources that come with the interpreter,
no network needed.

    python run.py --config=configs/quickstart.py

Five minutes on two CPU cores, to a validation loss of 5.06. `:smoke` takes seconds. Other methods:
`:method=adamw` and the other names of `METHODS`, compared in docs/pretraining.md; with another
`rank`, or `share` of the learning rate for the layers; one layer at a time: `:step=layerwise`.
"""

from memjax.config import adapter, default, optimizer, parse_arg

_LOW_RANK = dict(learning_rate=0.01, rank=64, refresh_every=50, scale=0.05)

# Name -> the optimizer, and `layer_scale`, the layers' share of the learning rate. Both were
# searched for with `steps=1000,seq_len=64`, three to eight points a method; methods in fewer bits
# have those of the method they store.
METHODS = {
  'adafactor': (dict(name='adafactor', learning_rate=0.02, scale_by_parameter=False), 0.025),
  'adalomo': (dict(name='adalomo', learning_rate=0.1), 0.2),
  'adam4bit': (dict(name='adam4bit', learning_rate=0.01), 0.025),
  'adam_mini': (dict(name='adam_mini', learning_rate=0.01), 0.025),
  'adamw': (dict(name='adamw', learning_rate=0.01), 0.025),
  'adamw8bit': (dict(name='adamw8bit', learning_rate=0.01), 0.025),
  'apollo': (dict(name='apollo', learning_rate=0.01, rank=64, refresh_every=50), 0.2),
  'apollo_mini': (dict(name='apollo_mini', learning_rate=0.01, refresh_every=50), 0.2),
  'apollo_mini8bit': (dict(name='apollo_mini8bit', learning_rate=0.01, refresh_every=50), 0.2),
  'came': (dict(name='came', learning_rate=0.01, b3=0.99), 0.025),
  'fira': (dict(name='fira', **_LOW_RANK), 1.0),
  'galore': (dict(name='galore', **_LOW_RANK), 1.0),
  'galore8bit': (dict(name='galore8bit', **_LOW_RANK), 1.0),
  'galore_adafactor': (dict(name='galore_adafactor', **_LOW_RANK), 1.0),
  'galore_svd': (dict(name='galore', **_LOW_RANK, basis='svd'), 1.0),
  'golore': (dict(name='golore', **_LOW_RANK, random_after=500), 1.0),
  'lion': (dict(name='lion', learning_rate=0.001, b1=0.95, b2=0.98), 0.03),
  'lion8bit': (dict(name='lion8bit', learning_rate=0.001, b1=0.95, b2=0.98), 0.03),
  'lora': (dict(name='adamw', learning_rate=0.01), 0.05),
  'muon': (dict(name='muon', learning_rate=0.01), 0.3),
  'q_galore': (dict(name='q_galore', **_LOW_RANK), 1.0),
  'qlora': (dict(name='adamw', learning_rate=0.01), 0.05),
  'q_galore8bit': (dict(name='q_galore8bit', **_LOW_RANK), 1.0),
  'relora': (dict(name='adamw', learning_rate=0.01), 0.05),
  'rso': (dict(name='vector_adam', learning_rate=0.01), 0.025),
  'sm3': (dict(name='sm3', learning_rate=0.2), 0.1),
  'switchlora': (dict(name='vector_adam', learning_rate=0.01), 0.05),
}
# What is trained in place of the layers' matrices, by methods that are adapters.
ADAPTERS = {
  'lora': dict(name='lora', rank=64, rest='.*'),
  'qlora': dict(name='lora', rank=64, rest='.*'),
  'relora': dict(name='relora', rank=64, every=200),
  'rso': dict(name='rso', rank=64, every=50),
  'switchlora': dict(name='switchlora', rank=64, alpha=8.0),
}


def get_config(arg=''):
  arg = parse_arg(
    arg,
    smoke=False,
    method='galore',
    steps=240,
    seq_len=128,
    batch_size=8,
    learning_rate=0.0,
    rank=0,
    share=0.0,
    step='whole_tree',
  )
  if arg.method not in METHODS:
    raise ValueError(f'no method {arg.method!r}; there are {", ".join(METHODS)}')
  c = default()
  c.model = 'llama_tiny' if arg.smoke else 'llama_quickstart'
  c.steps = 4 if arg.smoke else arg.steps
  c.batch_size = arg.batch_size
  c.seq_len = 32 if arg.smoke else arg.seq_len
  chosen, c.layer_scale = METHODS[arg.method]
  c.optimizer = optimizer(**chosen)
  c.optimizer.learning_rate = arg.learning_rate or c.optimizer.learning_rate
  if arg.share and 'scale' in chosen:
    c.optimizer.scale = arg.share
  elif arg.share:
    c.layer_scale = arg.share
  if arg.smoke and 'rank' in c.optimizer:
    c.optimizer.refresh_every = 2
  c.weights = 'nf4' if arg.method == 'qlora' else 'dense'
  if arg.step == 'layerwise':
    c.step, c.remat = 'layerwise', 'full'
  elif arg.step != 'whole_tree':
    raise ValueError(f"step is 'whole_tree' or 'layerwise' here, not {arg.step!r}")
  c.adapter = adapter(**ADAPTERS.get(arg.method, dict(name='none')))
  rank = 8 if arg.smoke else arg.rank
  if rank and arg.method in ADAPTERS:
    if 'alpha' in c.adapter:
      c.adapter.alpha *= rank / c.adapter.rank  # The scale, alpha over rank, stays.
    c.adapter.rank = rank
  elif rank and 'rank' in c.optimizer:
    c.optimizer.rank = rank
  elif arg.rank:
    raise ValueError(f'{arg.method!r} has no rank; leave the argument out')
  if arg.method == 'relora':
    every = c.adapter.every = 2 if arg.smoke else 200
    c.schedule.update(dict(name='jagged', restart_every=every, restart_warmup=every // 10))
  if arg.method == 'switchlora':
    c.adapter.descent = max(1, c.steps // 10)

  c.data.tokenizer = 'bytes' if arg.smoke else 'bpe'
  c.data.max_tokens = 200_000 if arg.smoke else 0
  c.log_every = 1 if arg.smoke else 10
  c.eval_every = 2 if arg.smoke else 100
  c.eval_tokens = 1024 if arg.smoke else 32_768
  c.checkpoint.every = 2 if arg.smoke else 100
  c.sample.tokens = 8 if arg.smoke else 64
  return c
