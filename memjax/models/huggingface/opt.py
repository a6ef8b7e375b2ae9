"""OPT: every linear map has a bias, and the embedding may be narrower than the rest."""

from typing import Any

from memjax.models import opt
from memjax.models.huggingface.family import Config, Family, Name, layer_norm, linear

DECODER = 'model.decoder'
LAYER = f'{DECODER}.layers.{{layer}}'


def _to_model(config: Config) -> opt.OPT:
  config.check('activation_function', 'relu')
  config.check('enable_bias', True)
  config.check('layer_norm_elementwise_affine', True)
  pre_norm = config.either('do_layer_norm_before', True)
  config.check('_remove_final_layer_norm', False)
  return opt.OPT(
    vocab=config['vocab_size'],
    hidden=config['hidden_size'],
    intermediate=config['ffn_dim'],
    heads=config['num_attention_heads'],
    layers=config['num_hidden_layers'],
    positions=config.either('max_position_embeddings', 2048),
    embed_dim=config.get('word_embed_proj_dim'),
    pre_norm=pre_norm,
    tied=config.either('tie_word_embeddings', True),
  )


def _to_config(model: opt.OPT) -> dict[str, Any]:
  return {
    'architectures': ['OPTForCausalLM'],
    'model_type': 'opt',
    'vocab_size': model.vocab,
    'hidden_size': model.hidden,
    'ffn_dim': model.intermediate,
    'num_attention_heads': model.heads,
    'num_hidden_layers': model.layers,
    'max_position_embeddings': model.positions,
    'word_embed_proj_dim': model.embed_dim,
    'do_layer_norm_before': model.pre_norm,
    'activation_function': 'relu',
    'enable_bias': True,
    'layer_norm_elementwise_affine': True,
    'tie_word_embeddings': model.tied,
  }


def _names(model: opt.OPT) -> tuple[Name, ...]:
  names = [
    Name('embed/embedding', f'{DECODER}.embed_tokens.weight'),
    Name('embed/positions/embedding', f'{DECODER}.embed_positions.weight'),
    *linear('blocks/attn/q', f'{LAYER}.self_attn.q_proj', bias=True),
    *linear('blocks/attn/k', f'{LAYER}.self_attn.k_proj', bias=True),
    *linear('blocks/attn/v', f'{LAYER}.self_attn.v_proj', bias=True),
    *linear('blocks/attn/o', f'{LAYER}.self_attn.out_proj', bias=True),
    *layer_norm('blocks/attn_norm', f'{LAYER}.self_attn_layer_norm'),
    *linear('blocks/mlp/up', f'{LAYER}.fc1', bias=True),
    *linear('blocks/mlp/down', f'{LAYER}.fc2', bias=True),
    *layer_norm('blocks/mlp_norm', f'{LAYER}.final_layer_norm'),
  ]
  if model.pre_norm:
    names += layer_norm('final_norm', f'{DECODER}.final_layer_norm')
  if model.embed_dim != model.hidden:
    names += linear('embed/project_in', f'{DECODER}.project_in')
    names += linear('project_out', f'{DECODER}.project_out')
  if not model.tied:
    names += linear('head', 'lm_head')
  return tuple(names)


OPT = Family(
  name='opt',
  architectures=('OPTForCausalLM',),
  # Norms add 1e-5 there, whatever the config says.
  holds=lambda model: isinstance(model, opt.OPT) and model.norm_eps == 1e-5,
  to_model=_to_model,
  to_config=_to_config,
  names=_names,
  prefix='model.',
  ignored=(r'^lm_head\.weight$',),
)
