"""Folders that `transformers` wrote, read here; and written here, read there."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models import huggingface

pytestmark = pytest.mark.parity

TINY = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_attention_heads=4,
  num_hidden_layers=2,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=2,
)
GROUPED = dict(TINY, num_key_value_heads=2)
LLAMA31 = dict(
  rope_type='llama3',
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)
OPT = {k: v for k, v in TINY.items() if k != 'intermediate_size'} | dict(ffn_dim=48)

# Name -> class of `transformers`, and its config.
FORMS = {
  'llama': ('Llama', TINY),
  'llama2_70b': ('Llama', dict(GROUPED, rms_norm_eps=1e-5)),
  'llama3_1': ('Llama', dict(GROUPED, rope_theta=100.0, rope_scaling=LLAMA31)),
  'llama3_2': ('Llama', dict(GROUPED, tie_word_embeddings=True)),
  'wide_heads': ('Llama', dict(GROUPED, head_dim=12)),
  'mistral': ('Mistral', dict(GROUPED, sliding_window=4)),
  'zephyr': ('Mistral', dict(GROUPED, sliding_window=None)),
  'qwen2': ('Qwen2', dict(GROUPED, tie_word_embeddings=True)),
  'qwen2_window': (
    'Qwen2',
    dict(GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=0),
  ),
  'qwen3': ('Qwen3', dict(GROUPED, head_dim=12)),
  'phi3': ('Phi3', dict(GROUPED, sliding_window=5)),
  'opt': ('OPT', OPT),
  'opt_350m': ('OPT', dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=16)),
}


def official(torch, kind, fields):
  """A model of `transformers` with random weights, so large that every one matters."""
  import transformers

  config = getattr(transformers, f'{kind}Config')(**fields)
  model = getattr(transformers, f'{kind}ForCausalLM')(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      mean = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
      parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def ragged():
  """Tokens, and a mask that pads them on the left, on the right, and not at all."""
  tokens = np.random.default_rng(0).integers(3, 64, (3, 11))
  mask = np.ones_like(tokens)
  mask[1, :4], mask[2, 7:] = 0, 0
  return tokens, mask


def their_logits(torch, model):
  tokens, mask = map(torch.tensor, ragged())
  # Positions as `generate` counts them: padding on the left moves no token.
  positions = (mask.cumsum(-1) - 1).clamp(min=0)
  given = {} if model.config.model_type == 'opt' else dict(position_ids=positions)
  with torch.no_grad():
    return model(tokens, attention_mask=mask, **given).logits.numpy()


def assert_logits_equal(ours, theirs, tolerance):
  real = ragged()[1] == 1
  scale = np.abs(theirs[real]).max()
  assert scale > 0.5  # There is something to compare.
  np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('form', FORMS)
def test_logits_equal_and_what_is_written_is_read_back(form, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  theirs = official(torch, *FORMS[form])
  theirs.save_pretrained(tmp_path / 'theirs')
  model, params = huggingface.load(tmp_path / 'theirs')
  expected = their_logits(torch, theirs)
  tokens, mask = map(jnp.asarray, ragged())
  assert_logits_equal(model.logits(params, tokens, mask), expected, 1e-5)

  for name, like in (('ours', None), ('like', tmp_path / 'theirs')):
    huggingface.save(tmp_path / name, model, params, like=like)
    again, report = AutoModelForCausalLM.from_pretrained(
      tmp_path / name, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    found = their_logits(torch, again)
    if type(again) is type(theirs):
      np.testing.assert_array_equal(found, expected)
    else:  # Phi-3's as another family with separate matrices, whose products round differently.
      assert not like
      assert_logits_equal(found, expected, 1e-6)
    if like:
      assert json.loads((tmp_path / 'like/config.json').read_text())['eos_token_id'] == 1


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_16_bit_folders_in_several_files_are_read_bit_for_bit(dtype, tmp_path):
  torch = pytest.importorskip('torch')
  theirs = official(torch, *FORMS['llama']).to(getattr(torch, dtype))
  theirs.save_pretrained(tmp_path, max_shard_size='20KB')
  assert (tmp_path / 'model.safetensors.index.json').exists()
  _, params = huggingface.load(tmp_path)
  kernel = params['blocks']['mlp']['up']['kernel']
  assert kernel.dtype == jnp.dtype(dtype)
  expected = torch.stack([layer.mlp.up_proj.weight.T for layer in theirs.model.layers])
  np.testing.assert_array_equal(np.float32(kernel), expected.detach().float().numpy())


def test_the_bare_model_without_a_prefix_is_read(tmp_path):
  """As `OPTModel.save_pretrained` writes it: keys without 'model.'."""
  torch = pytest.importorskip('torch')
  theirs = official(torch, *FORMS['opt'])
  theirs.model.save_pretrained(tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['architectures'] = ['OPTForCausalLM']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  model, params = huggingface.load(tmp_path)
  tokens, mask = map(jnp.asarray, ragged())
  assert_logits_equal(model.logits(params, tokens, mask), their_logits(torch, theirs), 1e-5)
