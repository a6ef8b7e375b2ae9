"""Phi-1 to Phi-2; Phi-3 is among the families of LLaMA."""

from typing import Any

from memjax.models import phi
from memjax.models.huggingface.family import Config, Family, Name, layer_norm, linear

LAYER = 'model.layers.{layer}'


def _to_model(config: Config) -> phi.Phi:
  config.check('hidden_act', 'gelu_new', 'gelu_pytorch_tanh')
  config.check('qk_layernorm', False)
  config.check('tie_word_embeddings', False)
  # `transformers` 5 writes the rotation as one group, earlier versions apart.
  rotation = {
    **config,
    **(config.get('rope_scaling') or {}),
    **(config.get('rope_parameters') or {}),
  }
  kind = rotation.get('rope_type', rotation.get('type', 'default'))
  if kind != 'default':
    raise ValueError(
      f"{config.path}: 'rope_scaling' is of type {kind!r}; models of type 'phi' are computed here "
      'without scaling'
    )
  hidden, heads = config['hidden_size'], config['num_attention_heads']
  return phi.Phi(
    vocab=config['vocab_size'],
    hidden=hidden,
    intermediate=config['intermediate_size'],
    heads=heads,
    layers=config['num_hidden_layers'],
    kv_heads=config.get('num_key_value_heads'),
    rotary_dim=int(hidden // heads * rotation.get('partial_rotary_factor', 0.5)),
    norm_eps=config.either('layer_norm_eps', 1e-5),
    rope_theta=float(rotation.get('rope_theta', 10_000.0)),
    positions=config.either('max_position_embeddings', 2048),
  )


def _to_config(model: phi.Phi) -> dict[str, Any]:
  return {
    'architectures': ['PhiForCausalLM'],
    'model_type': 'phi',
    'vocab_size': model.vocab,
    'hidden_size': model.hidden,
    'intermediate_size': model.intermediate,
    'num_attention_heads': model.heads,
    'num_hidden_layers': model.layers,
    'num_key_value_heads': model.kv_heads,
    'partial_rotary_factor': model.rotary_dim / model.head_dim,
    'rope_theta': model.rope_theta,
    'layer_norm_eps': model.norm_eps,
    'max_position_embeddings': model.positions,
    'hidden_act': 'gelu_new',
    'qk_layernorm': False,
    'tie_word_embeddings': False,
  }


def _names(model: phi.Phi) -> tuple[Name, ...]:
  del model  # Every size has the same leaves.
  maps = {
    'attn/q': 'self_attn.q_proj',
    'attn/k': 'self_attn.k_proj',
    'attn/v': 'self_attn.v_proj',
    'attn/o': 'self_attn.dense',
    'mlp/up': 'mlp.fc1',
    'mlp/down': 'mlp.fc2',
  }
  return (
    Name('embed/embedding', 'model.embed_tokens.weight'),
    *layer_norm('blocks/norm', f'{LAYER}.input_layernorm'),
    *(
      name
      for ours, theirs in maps.items()
      for name in linear(f'blocks/{ours}', f'{LAYER}.{theirs}', bias=True)
    ),
    *layer_norm('final_norm', 'model.final_layernorm'),
    *linear('head', 'lm_head', bias=True),
  )


PHI = Family(
  name='phi',
  architectures=('PhiForCausalLM',),
  holds=lambda model: isinstance(model, phi.Phi),
  to_model=_to_model,
  to_config=_to_config,
  names=_names,
  prefix='model.',
  ignored=(r'rotary_emb\.inv_freq$',),
)
