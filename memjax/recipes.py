"""Published training recipes, shared by the config files that differ only in size or method.

Pre-training LLaMA on C4 as in the GaLore paper, for `configs/galore_llama*.py` and
`configs/adamw_llama*.py`, and with other methods one layer at a time, on one small device.

LLaMA shapes, bfloat16 weights, 512 x 256 tokens an update, 10 % warm-up, cosine to a tenth (Zhao et
al., 2024, section 5.1 and its code). Two things differ on purpose: sequences are packed instead of
padded, and moments are f32, because bfloat16 second moments with b2 = 0.999 never decay.

C4 is read through TFDS when it is prepared (`pip install -e '.[tfds]'`, then `tfds build c4/en
--file_format=array_record`); otherwise the run says so and falls to the interpreter's own sources.
The published runs used the T5 tokenizer: give its SentencePiece file as
`--config.data.tokenizer=PATH`.
"""

from memjax.config import default, optimizer, parse_arg

# Per size: GaLore's rank, updates, and micro-batches that the 512 sequences are cut into.
SIZES = {
  '60m': dict(rank=128, steps=10_000, accumulate=1),
  '130m': dict(rank=256, steps=20_000, accumulate=2),
  '350m': dict(rank=256, steps=60_000, accumulate=4),
  '1b': dict(rank=512, steps=100_000, accumulate=8),
  '7b': dict(rank=1024, steps=150_000, accumulate=32),
  '13b': dict(rank=1024, steps=150_000, accumulate=32, model='llama2_13b'),
}

# Methods that train 7B one layer at a time: the papers' and their scripts' choices. Where none is
# known for pre-training, the learning rate is the authors' for further pre-training (AdaLomo) or
# fine-tuning (LOMO).
LAYERWISE = {
  'adalomo': dict(optimizer=dict(name='adalomo', learning_rate=1e-3), warmup_ratio=0.03),
  'apollo_mini': dict(
    optimizer=dict(name='apollo_mini8bit', learning_rate=0.01, refresh_every=200),
    clip_norm=0.0,
  ),
  'galore8bit': dict(
    optimizer=dict(
      name='galore8bit', learning_rate=0.005, refresh_every=500, scale=0.25, basis_bits=8
    ),
    clip_norm=1.0,
  ),
  'lomo': dict(
    optimizer=dict(name='sgd', learning_rate=0.03),
    schedule='linear',
    final_ratio=0.0,
    clip_norm=1.0,
  ),
  'q_galore': dict(
    optimizer=dict(name='q_galore8bit', learning_rate=0.004, refresh_every=500, scale=0.25),
    weights='int8',
  ),
}

# Full-rank Adam, from the paper's grid {0.01, 0.005, 0.001, 0.0005, 0.0001}; the chosen points are
# not printed there.
LEARNING_RATES = {'60m': 1e-3, '130m': 1e-3, '350m': 1e-3, '1b': 5e-4, '7b': 5e-4}


def llama_c4(size: str, smoke: bool):
  """Returns the config of one size without its optimizer; `smoke` is a few steps of a tiny model on
  a CPU.
  """
  c = default()
  c.model = 'llama_tiny' if smoke else SIZES[size].get('model', f'llama_{size}')
  c.param_dtype = 'bfloat16'
  c.compute_dtype = 'bfloat16'
  c.remat = 'none' if size in ('60m', '130m') else 'full'

  c.steps = 4 if smoke else SIZES[size]['steps']
  c.batch_size = 16 if smoke else 512
  c.accumulate = 2 if smoke else SIZES[size]['accumulate']
  c.seq_len = 32 if smoke else 256
  c.clip_norm = 1.0 if size == '7b' else 0.0

  c.data.sources = ('stdlib',) if smoke else ('tfds:c4/en', 'stdlib')
  c.data.tokenizer = 'bytes' if smoke else 'bpe'
  c.data.max_tokens = 200_000 if smoke else 0

  c.log_every = 1 if smoke else 10
  c.eval_every = 2 if smoke else 1000
  c.eval_tokens = 1024 if smoke else 10_000_000
  c.checkpoint.every = 2 if smoke else 1000
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.sample.tokens = 8 if smoke else 64
  return c


def galore_llama(size: str, arg: str):
  """Returns the GaLore config of one size; `arg` may hold `smoke` and `rank=...`."""
  arg = parse_arg(arg, smoke=False, rank=SIZES[size]['rank'])
  c = llama_c4(size, arg.smoke)
  c.optimizer = optimizer(
    'galore',
    learning_rate=0.005 if size == '7b' else 0.01,
    rank=min(arg.rank, 8) if arg.smoke else arg.rank,
    refresh_every=2 if arg.smoke else 500 if size == '7b' else 200,
    scale=0.25,
  )
  return c


def adamw_llama(size: str, arg: str):
  """Returns the full-rank baseline of one size; its learning rate is the best of the paper's grid
  at small sizes.
  """
  arg = parse_arg(arg, smoke=False)
  c = llama_c4(size, arg.smoke)
  c.optimizer = optimizer('adamw', learning_rate=LEARNING_RATES[size])
  return c


def layerwise_llama(method: str, arg: str, size: str = '7b', weights: str = ''):
  """Returns the config of a method that updates one layer at a time.

  The published update of 512 x 256 tokens keeps the layers' inputs, 32 GiB at 7B over all devices;
  on a single one, choose a smaller `batch_size`, or for projected methods that do not clip
  `accumulate_in='subspace'`, which keeps those of one micro-batch.

  Args:
    method: A key of `LAYERWISE`.
    arg: May hold `smoke`, `weights=...` and, for projected methods, `rank=...`.
    size: A key of `SIZES`.
    weights: How the blocks' matrices are held, 'dense' or 'int8'; '' as the method is published.
  """
  recipe = LAYERWISE[method]
  projected = 'galore' in method
  weights = weights or recipe.get('weights', 'dense')
  ranks = {'rank': SIZES[size]['rank']} if projected else {}
  arg = parse_arg(arg, smoke=False, weights=weights, **ranks)
  c = llama_c4(size, arg.smoke)
  c.step, c.remat = 'layerwise', 'full'
  c.weights = arg.weights
  c.clip_norm = recipe.get('clip_norm', 0.0)
  c.schedule.name = recipe.get('schedule', 'cosine')
  c.schedule.warmup_ratio = recipe.get('warmup_ratio', 0.1)
  c.schedule.final_ratio = recipe.get('final_ratio', 0.1)
  arguments = dict(recipe['optimizer'])
  if projected:
    arguments['rank'] = min(arg.rank, 8) if arg.smoke else arg.rank
  if arg.smoke and 'refresh_every' in arguments:
    arguments['refresh_every'] = 2
  c.optimizer = optimizer(**arguments)
  return c


def llama_zeroth_order(smoke: bool):
  """Returns the config of LLaMA 7B fine-tuned on values of the loss, without its optimizer."""
  c = default()
  c.model = 'llama_tiny' if smoke else 'llama_7b'
  c.step = 'zeroth_order'
  c.param_dtype = 'bfloat16'
  c.compute_dtype = 'bfloat16'
  c.steps = 4 if smoke else 20_000
  c.batch_size = 16
  c.seq_len = 32 if smoke else 256
  c.schedule.name = 'constant'
  c.schedule.warmup_ratio = 0.0
  c.data.tokenizer = 'bytes' if smoke else 'bpe'
  c.data.max_tokens = 200_000 if smoke else 0
  c.log_every = 1 if smoke else 10
  c.eval_every = 2 if smoke else 4000
  c.eval_tokens = 1024 if smoke else 1_000_000
  c.checkpoint.every = 2 if smoke else 4000
  c.sample.tokens = 8 if smoke else 64
  return c


def lora_llama7b(smoke: bool):
  """Returns the config of LLaMA 7B fine-tuned through adapters, without its adapter: sequences of
  2048 tokens, the layers rematerialised, Adam at a constant learning rate of 1e-4.
  """
  c = default()
  c.model = 'llama_tiny' if smoke else 'llama_7b'
  c.param_dtype = 'bfloat16'
  c.compute_dtype = 'bfloat16'
  c.remat = 'full'
  c.seq_len = 32 if smoke else 2048
  c.optimizer = optimizer('adamw', learning_rate=1e-4)
  c.schedule.name = 'constant'
  c.schedule.warmup_ratio = 0.03
  c.data.tokenizer = 'bytes' if smoke else 'bpe'
  c.data.max_tokens = 200_000 if smoke else 0
  c.log_every = 1 if smoke else 10
  c.eval_every = 2 if smoke else 200
  c.eval_tokens = 1024 if smoke else 1_000_000
  c.checkpoint.every = 2 if smoke else 200
  c.sample.tokens = 8 if smoke else 64
  return c


def opt_zeroth_order(size: str, arg: str, step: str):
  """Returns the config of an OPT model fine-tuned with MeZO.

  Args:
    size: As in `opt_13b`.
    arg: May hold `smoke`, `noise=...` and `weights=...`.
    step: 'zeroth_order', or 'streamed' from host memory.
  """
  arg = parse_arg(arg, smoke=False, noise='gaussian', weights='dense')
  c = llama_zeroth_order(arg.smoke)
  c.model = 'opt_tiny' if arg.smoke else f'opt_{size}'
  c.step = step
  c.weights = arg.weights
  c.optimizer = optimizer('mezo', learning_rate=1e-6, eps=1e-3, noise=arg.noise, log_steps=c.steps)
  return c
