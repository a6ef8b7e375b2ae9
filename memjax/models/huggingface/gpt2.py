"""GPT-2: queries, keys and values in one matrix, which lies as ours, `[in, out]`."""

from typing import Any

from memjax.models import gpt2
from memjax.models.huggingface.family import Config, Family, Name, layer_norm, linear, split

LAYER = 'transformer.h.{layer}'


def _to_model(config: Config) -> gpt2.GPT2:
  config.check('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
  config.check('scale_attn_weights', True)
  config.check('scale_attn_by_inverse_layer_idx', False)
  config.check('add_cross_attention', False)
  return gpt2.GPT2(
    vocab=config['vocab_size'],
    hidden=config['n_embd'],
    intermediate=config.either('n_inner', 4 * config['n_embd']),
    heads=config['n_head'],
    layers=config['n_layer'],
    positions=config.either('n_positions', 1024),
    norm_eps=config.either('layer_norm_epsilon', 1e-5),
    tied=config.either('tie_word_embeddings', True),
  )


def _to_config(model: gpt2.GPT2) -> dict[str, Any]:
  return {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': model.vocab,
    'n_embd': model.hidden,
    'n_inner': model.intermediate,
    'n_head': model.heads,
    'n_layer': model.layers,
    'n_positions': model.positions,
    'layer_norm_epsilon': model.norm_eps,
    'activation_function': 'gelu_new',
    'tie_word_embeddings': model.tied,
  }


def _names(model: gpt2.GPT2) -> tuple[Name, ...]:
  names = [
    Name('embed/embedding', 'transformer.wte.weight'),
    Name('embed/positions/embedding', 'transformer.wpe.weight'),
    *layer_norm('blocks/attn_norm', f'{LAYER}.ln_1'),
    *_fused(model, f'{LAYER}.attn.c_attn'),
    *_matrix('blocks/attn/o', f'{LAYER}.attn.c_proj'),
    *layer_norm('blocks/mlp_norm', f'{LAYER}.ln_2'),
    *_matrix('blocks/mlp/up', f'{LAYER}.mlp.c_fc'),
    *_matrix('blocks/mlp/down', f'{LAYER}.mlp.c_proj'),
    *layer_norm('final_norm', 'transformer.ln_f'),
  ]
  return tuple(names if model.tied else [*names, *linear('head', 'lm_head')])


def _fused(model: gpt2.GPT2, key: str) -> tuple[Name, ...]:
  """Kernels lie side by side in `[D, 3 D]`, biases in `[3 D]`."""
  sizes = 3 * (model.hidden,)
  kernels, biases = split(*sizes, axis=1, transpose=False), split(*sizes, transpose=False)
  return tuple(
    Name(f'blocks/attn/{name}/{part}', f'{key}.{theirs}', rule)
    for part, theirs, rules in (('kernel', 'weight', kernels), ('bias', 'bias', biases))
    for name, rule in zip('qkv', rules)
  )


def _matrix(path: str, key: str) -> tuple[Name, ...]:
  """A linear map whose matrix lies as ours."""
  return Name(f'{path}/kernel', f'{key}.weight'), Name(f'{path}/bias', f'{key}.bias')


GPT2 = Family(
  name='gpt2',
  architectures=('GPT2LMHeadModel', 'GPT2Model'),
  holds=lambda model: isinstance(model, gpt2.GPT2),
  to_model=_to_model,
  to_config=_to_config,
  names=_names,
  prefix='transformer.',
  # Masks were saved by early versions of `transformers`.
  ignored=(r'^lm_head\.weight$', r'\.attn\.(masked_)?bias$'),
)
