"""Our OPT beside the `transformers` one, on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from memjax.models import create

pytestmark = pytest.mark.parity

FORMS = {
  'pre_norm': {},
  'opt_350m': dict(pre_norm=False, embed_dim=16),
}


def official(torch, model, params):
  """A `transformers` model that holds our parameters."""
  from transformers import OPTConfig, OPTForCausalLM

  theirs = OPTForCausalLM(
    OPTConfig(
      vocab_size=model.vocab,
      hidden_size=model.hidden,
      ffn_dim=model.intermediate,
      num_attention_heads=model.heads,
      num_hidden_layers=model.layers,
      max_position_embeddings=model.positions,
      word_embed_proj_dim=model.embed_dim,
      do_layer_norm_before=model.pre_norm,
    )
  )
  state = {f'model.decoder.{k}': torch.tensor(np.array(v)) for k, v in names(params).items()}
  state['lm_head.weight'] = state['model.decoder.embed_tokens.weight']
  theirs.load_state_dict(state, strict=True)
  return theirs.eval()


def names(params):
  """Our leaves by their names there, where a matrix is `[out, in]`."""
  embed = params['embed']
  found = {
    'embed_tokens.weight': embed['embedding'],
    'embed_positions.weight': embed['positions']['embedding'],
  }
  if 'project_in' in embed:
    found['project_in.weight'] = embed['project_in']['kernel'].T
    found['project_out.weight'] = params['project_out']['kernel'].T
  if 'final_norm' in params:
    found |= norm('final_layer_norm', params['final_norm'])
  blocks = params['blocks']
  modules = {f'self_attn.{n}_proj': blocks['attn'][n] for n in 'qkv'}
  modules |= {'self_attn.out_proj': blocks['attn']['o']}
  modules |= {'fc1': blocks['mlp']['up'], 'fc2': blocks['mlp']['down']}
  for i in range(blocks['attn_norm']['scale'].shape[0]):
    for name, p in modules.items():
      found[f'layers.{i}.{name}.weight'] = p['kernel'][i].T
      found[f'layers.{i}.{name}.bias'] = p['bias'][i]
    for name, key in (('self_attn_layer_norm', 'attn_norm'), ('final_layer_norm', 'mlp_norm')):
      found |= norm(f'layers.{i}.{name}', jax.tree.map(lambda x, i=i: x[i], blocks[key]))
  return found


def norm(name, p):
  return {f'{name}.weight': p['scale'], f'{name}.bias': p['bias']}


@pytest.mark.parametrize('form', FORMS)
def test_logits_equal_those_of_transformers(form):
  torch = pytest.importorskip('torch')
  model = create('opt_tiny', vocab=64, hidden=32, intermediate=48, positions=16, **FORMS[form])
  params = random_params(model)
  tokens = np.random.default_rng(0).integers(0, model.vocab, (3, 11))
  mask = np.ones_like(tokens)
  mask[1, :4], mask[2, 8:] = 0, 0  # Padded on either side.
  with torch.no_grad():
    theirs = official(torch, model, params)(
      torch.tensor(tokens), attention_mask=torch.tensor(mask)
    ).logits.numpy()
  ours = np.asarray(model.logits(params, jnp.asarray(tokens), jnp.asarray(mask)))
  real = mask == 1
  np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=1e-5 * np.abs(theirs).max())
