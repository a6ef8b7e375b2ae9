"""Writes docs/methods.md: every method with its paper, its state formula, and its bytes.

    python docs/make_methods.py

The bytes are those of the optimizer's state as `memjax` builds it for the parameters of LLaMA-7B,
read from shapes; nothing is allocated.
"""

import math
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax

from memjax import models, optimizers
from memjax.steps import groups, rotations

PAGE = pathlib.Path(__file__).with_name('methods.md')
GIB = 2**30

HEAD = """\
# Methods

Made by `python docs/make_methods.py` from the code; a test keeps it fresh.

State is what the optimizer keeps between updates for one matrix `m x n`; `a` is its shorter side,
`c` its longer, `r` the rank; what is not said to be bytes is f32 numbers. The last column is the
whole state of LLaMA-7B (6.74 B parameters), embedding, head and norms included, at the arguments
given below; weights in bfloat16 take 12.55 GiB beside it.

"""


TURNS = """
## Layers that take turns

`config.step` names one of these where in each update some layers train and the others wait. A unit
is the embedding, one layer, or the head with the last norm. Only units that train have gradients,
and the backward pass ends at the lowest of them; the optimizer is any of those above. State, in the
last column, is AdamW's in f32 between updates, for LLaMA-7B with bfloat16 weights.

| `step` | who trains | what becomes of state | LLaMA-7B |
|---|---|---|---|
{rows}

- `groups.size`: units (`hift`) or layers at once; 1, 1 and 2 unless set.
- `groups.every`: updates between switches, 50 in `badam` and 20 in `lisa`; `hift` switches in each.
- `groups.order`: `bottom2up` (`hift`), `top2down` (`badam`), or `random`; `lisa` draws.
- `groups.ends`, `groups.keep`: see the table. A field that a step does not read is refused.
- `offload_state`: where state waits that is kept. Its default, -1, is all of it in host memory,
  from where a unit's comes to the device for its turn; 0 keeps it on the device.

HiFT's learning rate advances once a cycle, `ceil((L + 2) / size)` updates in which every group
trains once. With a warm-up the first cycle's is 0: it fills moments and moves nothing, so
that a run of no more than one cycle is refused.
"""

TAIL = """
## Adapters

Weights `W + s A B` of which the factors are trained, by any optimizer above: `memjax.adapters`, or
`config.adapter`. What is trained is `r (m + n)` numbers a matrix, less where said; state is that of
the optimizer on those. W stays in 16 bits, or in 8 or 4 (`config.weights`).

| `adapter.name` | what is added | paper |
|---|---|---|
| `lora` | `s A B`; rsLoRA, LoRA+ and dropout are arguments | \
[LoRA](https://arxiv.org/abs/2106.09685) |
| `dora` | the same, and a length for each column | [DoRA](https://arxiv.org/abs/2402.09353) |
| `relora` | `s A B`, merged and begun anew every so often; as published: `compat.relora` | \
[ReLoRA](https://arxiv.org/abs/2307.05695) |
| `switchlora` | `s A B`, some vectors of which change places with others in every update | \
[SwitchLoRA](https://arxiv.org/abs/2406.06564) |
| `rso` | `P B` with P drawn from a key: `r n` numbers | [RSO](https://arxiv.org/abs/2502.07222) |
| `flat_lora` | `s A B`, trained under noise of the merged weight | \
[Flat-LoRA](https://arxiv.org/abs/2409.14396) |
| `melora` | blocks of `s A B` along the diagonal | [MELoRA](https://arxiv.org/abs/2402.17263) |
| `sora` | `s A diag(g) B`, g made sparse; as published: `compat.sora_threshold` | \
[SoRA](https://arxiv.org/abs/2311.11696) |
| `pc_lora` | `s A B`, while W fades away | [PC-LoRA](https://arxiv.org/abs/2406.09117) |

Rows of a batch that stand for all: `config.select.name='colm'` ([CoLM](https://arxiv.org/abs/2407.19580));
as published: `compat.colm`.
"""


class Turns(NamedTuple):
  """One row of the table of steps in which layers take turns."""

  step: str
  paper: str
  trains: str
  state: str
  arguments: Mapping = MappingProxyType({})  # Of the rotation, as `config.groups` sets them.


TURNS_OF = (
  Turns(
    'hift',
    '[HiFT](https://arxiv.org/abs/2401.15207)',
    'all units, `groups.size` in each update, one group after the other',
    'waits for the next turn',
  ),
  Turns(
    'badam',
    '[BAdam](https://arxiv.org/abs/2404.02827)',
    '`groups.size` layers for `groups.every` updates, then the next; embedding and head never',
    'begins anew, and so does an f32 copy of the weights, which trains in their place',
  ),
  Turns(
    'badam',
    '[BAdam](https://arxiv.org/abs/2404.02827)',
    'the same; embedding and head have turns of their own',
    'the same',
    dict(ends=True),
  ),
  Turns(
    'lisa',
    '[LISA](https://arxiv.org/abs/2403.17919)',
    'embedding, head, and `groups.size` layers drawn every `groups.every` updates',
    'begins anew with each draw',
  ),
  Turns(
    'lisa',
    '[LISA](https://arxiv.org/abs/2403.17919)',
    'the same',
    'waits for the next turn, as in its official code',
    dict(keep=True),
  ),
)


class Method(NamedTuple):
  """One row and one section of the page."""

  title: str
  paper: str  # A URL, or '' for a method that is older than its papers.
  state: str  # Formula a matrix.
  cost: str  # What an update costs beyond Adam's elementwise work.
  choose: str  # When to take it.
  official: str  # What the official code does differently, and where it is reproduced.
  arguments: Mapping = MappingProxyType({})  # For the bytes; defaults otherwise.


METHODS = {
  'sgd': Method(
    'Gradient descent',
    '',
    'none; `m n` with momentum',
    'nothing',
    'as the floor of what an update can cost, or behind LOMO-like fused steps',
    'LOMO is gradient descent in a fused backward pass: `compat.lomo`.',
  ),
  'adamw': Method(
    'AdamW',
    'https://arxiv.org/abs/1711.05101',
    '`2 m n`',
    'nothing',
    'when memory is no concern; the baseline of every comparison here',
    "optax's, with f32 moments whatever the dtype of the weights: a bfloat16 second moment with "
    '`b2=0.999` never decays.',
  ),
  'lion': Method(
    'Lion',
    'https://arxiv.org/abs/2302.06675',
    '`m n`',
    'nothing',
    "with large batches; a learning rate three to ten times lower than AdamW's",
    "optax's.",
  ),
  'muon': Method(
    'Muon',
    'https://kellerjordan.github.io/posts/muon/',
    '`m n`; Adam on embedding, head and vectors',
    'five Newton-Schulz iterations a matrix, `~ 15 a^2 c` multiplications; a sharded matrix is '
    'gathered along one side',
    'for pre-training in fewer tokens, where its products are affordable',
    '`optax.contrib.muon` does not see the matrices of a stack `[L, m, n]`; here each is its own.',
  ),
  'adam_mini': Method(
    'Adam-mini',
    'https://arxiv.org/abs/2406.16793',
    '`m n + n`; one number a block: a neuron, a head of queries or keys, a token',
    'means over blocks',
    "for half of Adam's state at Adam's quality",
    'eps inside or outside the root, ignored `n_kv_heads`, partition by names of other models: '
    '`compat.adam_mini`.',
  ),
  'adafactor': Method(
    'Adafactor',
    'https://arxiv.org/abs/1804.04235',
    '`m + n`; `m n` more with momentum',
    'row and column means',
    'for almost no state, with a tuned learning rate and clipping',
    'optax factors the two largest axes of a stack and takes norms over all of its layers; here '
    'each matrix is its own. Dialects: `compat.adafactor`, `compat.galore_adafactor`.',
  ),
  'came': Method(
    'CAME',
    'https://arxiv.org/abs/2307.02047',
    '`m n + 2 (m + n)`',
    'two factored means',
    'for Adafactor with confidence; warm the learning rate up, nothing is bias-corrected',
    'no bias correction anywhere, so that the first updates are 11 to 18 times too large: '
    '`compat.came`.',
  ),
  'adalomo': Method(
    'AdaLomo',
    'https://arxiv.org/abs/2310.10195',
    '`m + n`',
    'row and column means, one norm a matrix',
    'with the layer-by-layer step: full-parameter training at the memory of inference',
    'a decay `1 - t^-0.8` where the paper has a constant, and no root in the printed update: '
    '`compat.adalomo`.',
  ),
  'sm3': Method(
    'SM3',
    'https://arxiv.org/abs/1901.11150',
    '`m + n`; `m n` more with momentum',
    'row and column maxima',
    "for sparse gradients such as embeddings'",
    "optax's always allocates a momentum of `m n`.",
  ),
  'vector_adam': Method(
    'Adam with a count a vector',
    'https://arxiv.org/abs/2406.06564',
    '`2 m n`; of factors of an adapted matrix `2 r (m + n) + 2 r`',
    'nothing',
    'where factors begin anew, all at once or vector by vector: ReLoRA, SwitchLoRA, RSO',
    'SwitchLoRA counts updates of a vector that is frozen, so that its first is half as large: '
    '`hold=False`. ReLoRA prunes each moment by another draw: `compat.relora`.',
  ),
  'galore': Method(
    'GaLore',
    'https://arxiv.org/abs/2403.03507',
    '`r (a + 2 c)`',
    'two products `m n r` an update; a new basis every `refresh_every` updates',
    "for pre-training at close to full-rank quality with a quarter of Adam's state",
    'refreshes every basis in the same update by an SVD of the gathered gradient; eps before the '
    'bias correction: `compat.galore_adamw`.',
    dict(rank=1024),
  ),
  'galore_adafactor': Method(
    'GaLore with Adafactor',
    'https://arxiv.org/abs/2403.03507',
    '`r a + r + c`',
    'as GaLore',
    'for the least state in a subspace',
    'momentum of the update with its learning rate already in it, decay before the update: '
    '`compat.galore_adafactor`.',
    dict(rank=1024),
  ),
  'golore': Method(
    'GoLore',
    'https://arxiv.org/abs/2410.11289',
    '`r (a + 2 c)`',
    'as GaLore',
    'for small batches late in training, where noise outweighs the gradient',
    'computes the projection of the momentum and drops it.',
    dict(rank=1024, random_after=100_000),
  ),
  'q_galore': Method(
    'Q-GaLore',
    'https://arxiv.org/abs/2407.08296',
    '`a (r / 2 + 4 ceil(r / 128)) + 28` bytes of basis, `2 r c` numbers of moments',
    'as GaLore, with fewer and fewer refreshes',
    'for GaLore where the bases weigh (large ranks)',
    'keeps 4-bit codes in a byte each; different betas in its layer-wise path: '
    '`compat.q_galore_adamw8bit`.',
    dict(rank=1024),
  ),
  'fira': Method(
    'Fira',
    'https://arxiv.org/abs/2410.01623',
    '`r (a + 2 c) + 1`',
    'as GaLore, and one residual `m n`',
    "for full-rank updates at GaLore's state",
    'the residual subtracts the projection after its scale, so that it is not the complement: '
    '`compat.fira_adamw`.',
    dict(rank=1024),
  ),
  'apollo': Method(
    'APOLLO',
    'https://arxiv.org/abs/2412.05270',
    '`2 r c + 1`; the projection is drawn, not kept',
    'one product `m n r` an update, and drawing its random factor',
    'for Adam-like training without any factorisation',
    'stores the projection, takes the root of its `scale`: `compat.apollo_adamw`.',
    dict(rank=256),
  ),
  'apollo_mini': Method(
    'APOLLO-Mini',
    'https://arxiv.org/abs/2412.05270',
    '`2 c + 1`',
    'a product with one vector',
    "for gradient descent's memory and Adam's behaviour",
    "as APOLLO; its published memory leaves out the embedding's and the head's moments.",
  ),
  'adamw8bit': Method(
    'AdamW in 8 bits',
    'https://arxiv.org/abs/2110.02861',
    '`2 m n (1 + 1 / 64)` bytes, codes and scales',
    'codes are read and written, block by block',
    'as AdamW with a quarter of its state',
    'blocks run over the flattened leaf and straddle devices; decay before or after the update '
    'depending on the backend: `compat.adamw8bit`, `compat.adamw8bit_ao`.',
  ),
  'adam4bit': Method(
    'Adam in 4 bits',
    'https://arxiv.org/abs/2309.01507',
    '`m n (1 + 1 / 16)` bytes, codes and scales',
    'as in 8 bits',
    'as AdamW with an eighth of its state',
    'torchao uses plain blocks where the paper normalises the second moment by rank one.',
  ),
  'lion8bit': Method(
    'Lion in 8 bits',
    'https://arxiv.org/abs/2110.02861',
    '`m n (1 + 1 / 64)` bytes, codes and scales',
    'as in 8 bits',
    'as Lion with a quarter of its state',
    "bitsandbytes' blocks run over the flattened leaf and straddle devices.",
  ),
  'galore8bit': Method(
    'GaLore with 8-bit moments',
    'https://arxiv.org/abs/2403.03507',
    '`4 r a + 2 r c (1 + 1 / 64)` bytes',
    'as GaLore, and codes',
    'for the published 7B recipe',
    '`compat.galore_adamw8bit`.',
    dict(rank=1024),
  ),
  'q_galore8bit': Method(
    'Q-GaLore with 8-bit moments',
    'https://arxiv.org/abs/2407.08296',
    '`a (r / 2 + 4 ceil(r / 128)) + 28` bytes of basis, `2 r c (1 + 1 / 64)` bytes of moments',
    'as Q-GaLore, and codes',
    "for the published recipe, with `weights='int8'`",
    '`compat.q_galore_adamw8bit`.',
    dict(rank=1024),
  ),
  'apollo_mini8bit': Method(
    'APOLLO-Mini with 8-bit moments',
    'https://arxiv.org/abs/2412.05270',
    '`2 c (1 + 1 / 64) + 4` bytes; `2 c + 1` where c is below 4,096',
    'as APOLLO-Mini, and codes',
    'where the moments of embedding and head, `2 m n` bytes, are what weighs',
    "apollo-torch's `QAPOLLOAdamW`, whose blocks run over the flattened leaf.",
  ),
}


def page() -> str:
  """Returns the text of the page."""
  params = models.create('llama_7b', param_dtype='bfloat16').abstract()
  sizes = {name: state_bytes(name, params) for name in METHODS}
  lines = ['| method | `optimizer.name` | state of a matrix | LLaMA-7B |', '|---|---|---|---|']
  for name, size in sorted(sizes.items(), key=lambda item: item[1]):
    method = METHODS[name]
    lines.append(f'| {link(method)} | `{name}` | {method.state} | {size / GIB:,.2f} GiB |')
  head = HEAD + '\n'.join(lines) + '\n'
  turns = TURNS.format(rows='\n'.join(map(turn, TURNS_OF)))
  return head + ''.join(section(name) for name in METHODS) + turns + TAIL


def state_bytes(name: str, params) -> int:
  """Returns the bytes of a method's state for `params`, a tree of shapes."""
  transform = optimizers.OPTIMIZERS[name](1e-3, **METHODS[name].arguments)
  return bytes_of(jax.eval_shape(transform.init, params))


def bytes_of(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def turn(row: Turns) -> str:
  """Returns a row of the table of steps in which layers take turns."""
  model = models.create('llama_7b', param_dtype='bfloat16')
  rotation = rotations.ROTATIONS[row.step](model.layers, **row.arguments)
  init = lambda key: groups.init_state(model.init, optimizers.OPTIMIZERS['adamw'], rotation, key)
  size = bytes_of(jax.eval_shape(init, jax.random.key(0))['opt'])
  name = ', '.join([f'`{row.step}`', *(f'`groups.{k}={v}`' for k, v in row.arguments.items())])
  where = 'in host memory' if rotation.keep else 'on the device'
  return f'| {name} ({row.paper}) | {row.trains} | {row.state} | {size / GIB:,.2f} GiB {where} |'


def link(method: Method) -> str:
  return f'[{method.title}]({method.paper})' if method.paper else method.title


def section(name: str) -> str:
  """Returns what the page says of one method."""
  method = METHODS[name]
  arguments = ', '.join(f'{k}={v:,}' for k, v in method.arguments.items())
  lines = [
    f'\n## {method.title}\n',
    f'- **Name**: `{name}`' + (f'; LLaMA-7B above with {arguments}' if arguments else ''),
    f'- **State**: {method.state}',
    f'- **An update costs**: {method.cost}',
    f'- **Choose it** {method.choose}',
  ]
  if method.official:
    lines.append(f'- **Official code**: {method.official}')
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  PAGE.write_text(page())
