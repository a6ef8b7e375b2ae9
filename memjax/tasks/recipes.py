"""Published fine-tuning recipes, shared by the config files that differ in task, size or method.

A config of a task is a config like any other: `config.optimizer`, `config.adapter` and
`config.step` take what they take elsewhere.
"""

from ml_collections import ConfigDict

from memjax import adapters, optimizers
from memjax.build_model import bare_model
from memjax.config import adapter, default, optimizer
from memjax.models import PRESETS
from memjax.tasks.loading import is_encoder
from memjax.tasks.tables import GLUE, find

# Training examples, which fix how many updates an epoch has.
GLUE_SIZES = {
  'cola': 8_551,
  'sst2': 67_349,
  'mrpc': 3_668,
  'qqp': 363_846,
  'stsb': 5_749,
  'mnli': 392_702,
  'qnli': 104_743,
  'rte': 2_490,
  'wnli': 635,
}

# GaLore's table 7: learning rates of rank 8; those of rank 4 are 1e-5, or 3e-5 for the two below.
GALORE_RATES = {
  'mnli': 1e-5,
  'sst2': 2e-5,
  'mrpc': 2e-5,
  'cola': 1e-5,
  'qnli': 1e-5,
  'qqp': 2e-5,
  'rte': 2e-5,
  'stsb': 3e-5,
}
RANK_4_FASTER = ('mrpc', 'cola')

# Tokens a row of MeZO's tasks. The published limit is 2,048; here rows of a batch are equally long.
MEZO_LENGTHS = {
  'sst2': 128,
  'rte': 512,
  'cb': 512,
  'boolq': 1024,
  'wsc': 256,
  'wic': 128,
  'multirc': 1024,
  'copa': 64,
  'record': 1024,
  'squad': 1024,
  'drop': 1024,
}
SMALL_DEV = ('cb', 'copa')  # Of 250 and 400 rows, 500 to develop on would leave none.


def use_model(c: ConfigDict, model: str, otherwise: str) -> None:
  """Sets the model: a preset's name, or a folder of pretrained weights; '' is `otherwise`."""
  if model and model not in PRESETS:
    c.load = model
  else:
    c.model = model or otherwise


def use_method(c: ConfigDict, method: str, learning_rate: float, **choices) -> None:
  """Sets the method: an optimizer, an adapter with AdamW, or a zeroth-order method with its step.

  Args:
    c: The config.
    method: A key of `memjax.optimizers.OPTIMIZERS` or `ZEROTH_ORDER`, or of
      `memjax.adapters.ADAPTERS`.
    learning_rate: Peak.
    **choices: Arguments of methods; those that `method` does not take are left out.
  """
  if method in adapters.ADAPTERS and method != 'none':
    known = adapters.arguments(method)
    c.adapter = adapter(method, **{k: v for k, v in choices.items() if k in known})
    method = 'adamw'
  if method in optimizers.ZEROTH_ORDER:
    c.step = 'zeroth_order'
  every = optimizers.OPTIMIZERS | optimizers.ZEROTH_ORDER
  known = optimizers.arguments(method) if method in every else {}
  # Words go to words and numbers to numbers: LOZO's `scale` is not GaLore's.
  same = lambda value, default: isinstance(value, str) == isinstance(default, str)
  taken = {k: v for k, v in choices.items() if k in known and same(v, known[k])}
  c.optimizer = optimizer(method, **{'learning_rate': learning_rate, **taken})


def try_out(c: ConfigDict, task: str) -> None:
  """Turns a config into a few steps of a tiny model on made-up rows, seconds on a CPU."""
  c.task.train, c.task.dev, c.task.test = 'made_up:32', 'made_up:8:32', 'made_up:8:40'
  c.task.examples = c.task.dev_examples = c.task.test_examples = 0
  c.task.shots = c.task.demonstrations = 0
  c.task.prefix = 'auto'
  c.task.new_tokens = 4
  c.data.tokenizer = 'bytes'
  c.steps, c.batch_size, c.accumulate, c.seq_len = 4, 8, 1, 32
  if find(task).kind == 'generation':
    c.seq_len = 48
  c.log_every, c.eval_every, c.checkpoint.every = 1, 2, 2


def glue(arg) -> ConfigDict:
  """Returns the config of one GLUE task; `arg` is that of `configs/glue.py`."""
  c = default()
  c.task.name = arg.task
  c.task.train, c.task.dev, c.task.test = arg.train, arg.dev, arg.test
  size = GLUE_SIZES.get(arg.task, 0)
  c.batch_size = 32 if arg.task == 'cola' else 16
  c.steps = arg.steps or max(30 * size // c.batch_size, 1000)
  c.seq_len = arg.seq_len
  use_model(c, 'bert_tiny' if arg.smoke else arg.model, 'roberta_base')
  rate = GALORE_RATES.get(arg.task, 1e-5)
  if arg.rank == 4:
    rate = 3e-5 if arg.task in RANK_4_FASTER else 1e-5
  # An encoder's head is new and is trained beside an adapter; a decoder's belongs to its prompts.
  new_head = arg.method in adapters.ADAPTERS and is_encoder(bare_model(c))
  use_method(
    c,
    arg.method,
    arg.learning_rate or rate,
    rank=arg.rank,
    scale=4.0 if arg.rank == 4 else 2.0,
    refresh_every=500,
    alpha=2.0 * arg.rank,
    **({'rest': 'head/.*'} if new_head else {}),
  )
  c.schedule.name, c.schedule.warmup_ratio, c.schedule.final_ratio = 'linear', 0.0, 0.0
  c.log_every, c.eval_every, c.checkpoint.every = 10, 500, 500
  if arg.smoke:
    try_out(c, arg.task)
  return c


def mezo_opt(arg) -> ConfigDict:
  """Returns the config of OPT on one of MeZO's tasks; `arg` is that of `configs/mezo_opt.py`."""
  if arg.task not in MEZO_LENGTHS:
    raise ValueError(f'no task {arg.task!r} among {", ".join(MEZO_LENGTHS)}')
  c = default()
  c.task.name = arg.task
  c.task.train, c.task.test = arg.train, arg.test
  c.task.examples, c.task.test_examples = 1000, 1000
  c.task.dev_examples = 100 if arg.task in SMALL_DEV else 500
  c.task.loss = 'options' if find(arg.task).kind == 'classification' else 'tokens'
  c.task.prefix = '0'  # The published runs begin with <s>, though OPT's own tokenizer has </s>.
  use_model(c, 'opt_tiny' if arg.smoke else arg.model, f'opt_{arg.size}')
  c.param_dtype = c.compute_dtype = 'bfloat16'
  c.step = 'zeroth_order'
  c.steps, c.batch_size, c.seq_len = 20_000, 16, MEZO_LENGTHS[arg.task]
  adapted = arg.adapter != 'none'
  if adapted:
    c.adapter = adapter(arg.adapter, rank=8, alpha=16.0, targets='blocks/attn/(q|v)/kernel')
  use_method(
    c,
    arg.method,
    arg.learning_rate or (1e-4 if adapted else 1e-6),
    eps=1e-2 if adapted else 1e-3,
    log_steps=c.steps,
  )
  c.schedule.name, c.schedule.warmup_ratio = 'constant', 0.0
  c.log_every, c.eval_every, c.checkpoint.every = 10, 4000, 4000
  if arg.smoke:
    try_out(c, arg.task)
  return c


def instruct(arg) -> ConfigDict:
  """Returns the config of instruction tuning; `arg` is that of `configs/instruct.py`."""
  c = default()
  c.task.name = 'instruct'
  c.task.train, c.task.test = arg.train, arg.test
  c.task.dev_examples = 0 if arg.test else 500
  use_model(c, 'llama_tiny' if arg.smoke else arg.model, 'llama2_7b')
  c.param_dtype = c.compute_dtype = 'bfloat16'
  c.remat = 'full'
  c.steps, c.batch_size, c.accumulate, c.seq_len = 1024, 64, 8, 512
  rank = min(arg.rank, 8) if arg.smoke else arg.rank
  use_method(c, arg.method, arg.learning_rate or 2e-5, rank=rank, alpha=4.0 * rank)
  c.schedule.name, c.schedule.warmup_ratio, c.schedule.final_ratio = 'linear', 0.03, 0.0
  c.log_every, c.eval_every, c.checkpoint.every = 10, 256, 256
  if arg.smoke:
    try_out(c, 'instruct')
  return c


def known_glue(task: str) -> None:
  """Raises a `ValueError` for a task that is not one of GLUE's."""
  names = [t.name for t in GLUE]
  if task not in names:
    raise ValueError(f'no task {task!r} among {", ".join(names)}')
