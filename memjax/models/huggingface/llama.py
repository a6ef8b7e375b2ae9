"""LLaMA and the families that are fields of it: Mistral, Qwen2, Qwen3, Phi-3.

Shapes in this file: hidden width `D`, MLP width `F`, `N` query and `K` key-value heads of width
`H`.
"""

from typing import Any

from memjax.models.huggingface.family import (
  TRANSPOSE,
  Config,
  Family,
  Name,
  linear,
  split,
)
from memjax.models.llama import Llama
from memjax.models.rotary import RopeScaling

LAYER = 'model.layers.{layer}'


def _to_model(config: Config, **fields: Any) -> Llama:
  """What the families have in common; `fields` is what one of them adds or decides otherwise."""
  config.check('hidden_act', 'silu')
  theta, scaling = _rope(config)
  common = dict(
    vocab=config['vocab_size'],
    hidden=config['hidden_size'],
    intermediate=config['intermediate_size'],
    heads=config['num_attention_heads'],
    layers=config['num_hidden_layers'],
    kv_heads=config.get('num_key_value_heads'),
    head_dim=config.get('head_dim'),
    norm_eps=config.either('rms_norm_eps', 1e-6),
    rope_theta=theta,
    rope_scaling=scaling,
    tied=config.either('tie_word_embeddings', False),
  )
  return Llama(**common | fields)


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
  """Rotary base and scaling, which `transformers` 5 writes as one group and earlier ones apart."""
  given = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
  theta = given.get('rope_theta', config.either('rope_theta', 10_000.0))
  part = given.get('partial_rotary_factor', config.either('partial_rotary_factor', 1.0))
  kind = given.get('rope_type', given.get('type', 'default'))
  if part != 1:
    raise ValueError(
      f"{config.path}: 'partial_rotary_factor' is {part}; a head is rotated as a whole here in "
      f'models of type {config.type!r}'
    )
  if kind == 'default':
    return float(theta), None
  if kind != 'llama3':
    raise ValueError(
      f"{config.path}: 'rope_scaling' is of type {kind!r}; 'default' and 'llama3' are computed here"
    )
  group = Config(given, f"{config.path}: 'rope_scaling'")
  return float(theta), RopeScaling(
    factor=float(group['factor']),
    low=float(group['low_freq_factor']),
    high=float(group['high_freq_factor']),
    original_length=group['original_max_position_embeddings'],
  )


def _to_config(model: Llama, kind: str, architecture: str, **fields: Any) -> dict[str, Any]:
  scaling = model.rope_scaling
  return {
    'architectures': [architecture],
    'model_type': kind,
    'vocab_size': model.vocab,
    'hidden_size': model.hidden,
    'intermediate_size': model.intermediate,
    'num_attention_heads': model.heads,
    'num_hidden_layers': model.layers,
    'num_key_value_heads': model.kv_heads,
    'head_dim': model.head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': model.norm_eps,
    'rope_theta': model.rope_theta,
    'rope_scaling': scaling
    and {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low,
      'high_freq_factor': scaling.high,
      'original_max_position_embeddings': scaling.original_length,
    },
    'tie_word_embeddings': model.tied,
    **fields,
  }


def _names(model: Llama) -> tuple[Name, ...]:
  attn = f'{LAYER}.self_attn'
  return (
    *_outside(model),
    *linear('blocks/attn/q', f'{attn}.q_proj', model.qkv_bias),
    *linear('blocks/attn/k', f'{attn}.k_proj', model.qkv_bias),
    *linear('blocks/attn/v', f'{attn}.v_proj', model.qkv_bias),
    *linear('blocks/mlp/gate', f'{LAYER}.mlp.gate_proj'),
    *linear('blocks/mlp/up', f'{LAYER}.mlp.up_proj'),
    *(_head_norms(attn) if model.qk_norm else ()),
  )


def _fused_names(model: Llama) -> tuple[Name, ...]:
  """Phi-3 keeps queries, keys and values in one tensor `[(N + 2K) H, D]`, gate and up in another,
  `[2F, D]`.
  """
  queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
  qkv = split(queries, keys, keys)
  gate_up = split(model.intermediate, model.intermediate)
  return (
    *_outside(model),
    *(
      Name(f'blocks/attn/{name}/kernel', f'{LAYER}.self_attn.qkv_proj.weight', rule)
      for name, rule in zip('qkv', qkv)
    ),
    *(
      Name(f'blocks/mlp/{name}/kernel', f'{LAYER}.mlp.gate_up_proj.weight', rule)
      for name, rule in zip(('gate', 'up'), gate_up)
    ),
  )


def _outside(model: Llama) -> tuple[Name, ...]:
  """What is called the same in all of them."""
  names = (
    Name('embed/embedding', 'model.embed_tokens.weight'),
    Name('blocks/attn_norm/scale', f'{LAYER}.input_layernorm.weight'),
    Name('blocks/attn/o/kernel', f'{LAYER}.self_attn.o_proj.weight', TRANSPOSE),
    Name('blocks/mlp_norm/scale', f'{LAYER}.post_attention_layernorm.weight'),
    Name('blocks/mlp/down/kernel', f'{LAYER}.mlp.down_proj.weight', TRANSPOSE),
    Name('final_norm/scale', 'model.norm.weight'),
  )
  return names if model.tied else (*names, *linear('head', 'lm_head'))


def _head_norms(attn: str) -> tuple[Name, ...]:
  return (
    Name('blocks/attn/q_norm/scale', f'{attn}.q_norm.weight'),
    Name('blocks/attn/k_norm/scale', f'{attn}.k_norm.weight'),
  )


def _llama(config: Config) -> Llama:
  config.check('attention_bias', False)
  config.check('mlp_bias', False)
  return _to_model(config)


def _mistral(config: Config) -> Llama:
  kv_heads = config.get('num_key_value_heads', 8)
  return _to_model(config, kv_heads=kv_heads, window=config.get('sliding_window', 4096))


def _qwen2(config: Config) -> Llama:
  return _to_model(
    config,
    kv_heads=config.get('num_key_value_heads', 32),
    qkv_bias=True,
    window=_qwen_window(config),
  )


def _qwen3(config: Config) -> Llama:
  config.check('attention_bias', False)
  return _to_model(
    config,
    kv_heads=config.get('num_key_value_heads', 32),
    head_dim=config.either('head_dim', 128),
    qk_norm=True,
    window=_qwen_window(config),
  )


def _qwen_window(config: Config) -> int | None:
  """Qwen's window, of the layers from `max_window_layers` on; all or none of them here."""
  if not config.get('use_sliding_window', False):
    return None
  window, layers = config.get('sliding_window', 4096), config['num_hidden_layers']
  whole = config.get('max_window_layers', 28)
  if kinds := config.get('layer_types'):
    whole = sum(kind == 'full_attention' for kind in kinds)
  if window is None or whole >= layers:
    return None
  if whole > 0:
    raise ValueError(
      f"{config.path}: 'max_window_layers' leaves {whole} of {layers} layers without a sliding "
      'window; here all layers have one or none'
    )
  return window


def _phi3(config: Config) -> Llama:
  return _to_model(
    config,
    norm_eps=config.either('rms_norm_eps', 1e-5),
    head_dim=None,
    window=config.get('sliding_window'),
  )


def _qwen_fields(model: Llama) -> dict[str, Any]:
  windowed = model.window is not None
  return dict(
    use_sliding_window=windowed,
    sliding_window=model.window,
    max_window_layers=0 if windowed else model.layers,
  )


def _holds(qkv_bias: bool = False, qk_norm: bool = False, *, window: bool = True):
  def holds(model):
    return (
      isinstance(model, Llama)
      and (model.qkv_bias, model.qk_norm) == (qkv_bias, qk_norm)
      and (window or model.window is None)
    )

  return holds


def _is_phi3(model: Any) -> bool:
  shared = _holds()(model) and model.rope_scaling is None
  return shared and model.heads * model.head_dim == model.hidden


# Rotary frequencies were saved by early versions of `transformers`; a tied head by some.
COMMON = dict(prefix='model.', ignored=(r'rotary_emb\.inv_freq$', r'^lm_head\.weight$'))

LLAMA = Family(
  name='llama',
  architectures=('LlamaForCausalLM', 'LLaMAForCausalLM'),
  holds=_holds(window=False),
  to_model=_llama,
  to_config=lambda model: _to_config(
    model, 'llama', 'LlamaForCausalLM', attention_bias=False, mlp_bias=False
  ),
  names=_names,
  **COMMON,
)

MISTRAL = Family(
  name='mistral',
  architectures=('MistralForCausalLM',),
  holds=_holds(),
  to_model=_mistral,
  to_config=lambda model: _to_config(
    model, 'mistral', 'MistralForCausalLM', sliding_window=model.window
  ),
  names=_names,
  **COMMON,
)

QWEN2 = Family(
  name='qwen2',
  architectures=('Qwen2ForCausalLM',),
  holds=_holds(qkv_bias=True),
  to_model=_qwen2,
  to_config=lambda model: _to_config(model, 'qwen2', 'Qwen2ForCausalLM', **_qwen_fields(model)),
  names=_names,
  **COMMON,
)

QWEN3 = Family(
  name='qwen3',
  architectures=('Qwen3ForCausalLM',),
  holds=_holds(qk_norm=True),
  to_model=_qwen3,
  to_config=lambda model: _to_config(
    model, 'qwen3', 'Qwen3ForCausalLM', attention_bias=False, **_qwen_fields(model)
  ),
  names=_names,
  **COMMON,
)

PHI3 = Family(
  name='phi3',
  architectures=('Phi3ForCausalLM',),
  holds=_is_phi3,
  to_model=_phi3,
  to_config=lambda model: _to_config(model, 'phi3', 'Phi3ForCausalLM', sliding_window=model.window),
  names=_fused_names,
  **COMMON,
)
