"""GGUF files with known blocks in every form that is read, and what is said of others."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.data.tokenizers import open_tokenizer
from memjax.models import huggingface, load
from memjax.models.huggingface.gguf_tokenizer import tokenizer_json
from memjax.models.rotary import RopeScaling, frequencies

gguf = pytest.importorskip('gguf')
RNG = np.random.default_rng(0)
D, F, V, N, K = 256, 512, 32, 4, 2
H = D // N


# Blocks, written as llama.cpp documents them: random bytes, and the numbers they stand for.


def scales(rows, blocks):
  return RNG.uniform(0.01, 0.1, (rows, blocks)).astype(np.float16)


def raw(*parts):
  """Fields of blocks `[rows, blocks, ...]`, side by side as bytes `[rows, bytes]`."""
  as_bytes = [
    np.ascontiguousarray(p)[..., None].view(np.uint8) if p.ndim == 2 else p for p in parts
  ]
  joined = np.concatenate([b.view(np.uint8) for b in as_bytes], axis=-1)
  return joined.reshape(joined.shape[0], -1)


def nibbles(packed):
  """Low halves of the bytes, then high ones."""
  return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def q4_0(rows, columns):
  d, q = scales(rows, columns // 32), RNG.integers(0, 256, (rows, columns // 32, 16), np.uint8)
  values = np.float32(d)[..., None] * (nibbles(q) - 8)
  return raw(d, q), values.reshape(rows, columns)


def q4_1(rows, columns):
  d, q = scales(rows, columns // 32), RNG.integers(0, 256, (rows, columns // 32, 16), np.uint8)
  least = -scales(rows, columns // 32)
  values = np.float32(d)[..., None] * nibbles(q) + np.float32(least)[..., None]
  return raw(d, least, q), values.reshape(rows, columns)


def q8_0(rows, columns):
  d, q = scales(rows, columns // 32), RNG.integers(-128, 128, (rows, columns // 32, 32), np.int8)
  values = np.float32(d)[..., None] * np.float32(q)
  return raw(d, q.view(np.uint8)), values.reshape(rows, columns)


def q4_k(rows, columns):
  """256 numbers in 8 groups, each with a scale and a minimum of 6 bits, packed in 12 bytes."""
  blocks = columns // 256
  d, least = scales(rows, blocks), scales(rows, blocks)
  s, m = RNG.integers(0, 64, (2, rows, blocks, 8), np.uint8)
  packed = np.concatenate(
    [
      s[..., :4] | (s[..., 4:] >> 4) << 6,
      m[..., :4] | (m[..., 4:] >> 4) << 6,
      (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
    ],
    axis=-1,
  )
  q = RNG.integers(0, 256, (rows, blocks, 128), np.uint8)
  groups = nibbles(q.reshape(rows, blocks, 4, 32)).reshape(rows, blocks, 8, 32)
  values = np.float32(d)[..., None, None] * s[..., None] * groups
  values -= np.float32(least)[..., None, None] * m[..., None]
  return raw(d, least, packed, q), values.reshape(rows, columns)


def f32(*shape):
  array = RNG.standard_normal(shape).astype(np.float32)
  return array, array


def f16(*shape):
  array = RNG.standard_normal(shape).astype(np.float16)
  return array, np.float32(array)


FORMS = {'q4_0': q4_0, 'q4_1': q4_1, 'q8_0': q8_0, 'q4_k': q4_k, 'f16': f16, 'f32': f32}
TENSORS = {
  'token_embd': ('f16', (V, D)),
  'output_norm': ('f32', (D,)),
  'blk.0.attn_norm': ('f32', (D,)),
  'blk.0.attn_q': ('q4_0', (D, D)),
  'blk.0.attn_k': ('q4_1', (K * H, D)),
  'blk.0.attn_v': ('q8_0', (K * H, D)),
  'blk.0.attn_output': ('q4_k', (D, D)),
  'blk.0.ffn_norm': ('f32', (D,)),
  'blk.0.ffn_gate': ('f32', (F, D)),
  'blk.0.ffn_up': ('f16', (F, D)),
  'blk.0.ffn_down': ('q4_k', (D, F)),
}


def write(path, kind='llama', tensors=TENSORS, extra=(), tokenizer=False, **fields):
  """Writes a file of one layer; returns what its tensors stand for."""
  writer = gguf.GGUFWriter(path, kind)
  writer.add_block_count(1)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  writer.add_head_count_kv(K)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(100_000.0)
  writer.add_rope_dimension_count(H)
  for name, value in fields.items():
    writer.add_string(f'{kind}.{name.replace("__", ".")}', value)
  values = {}
  for name, (form, shape) in tensors.items():
    data, values[name] = FORMS[form](*shape)
    quantised = gguf.GGMLQuantizationType[form.upper()] if form.startswith('q') else None
    writer.add_tensor(name if '.bias' in name else f'{name}.weight', data, raw_dtype=quantised)
  for name, array in extra:
    writer.add_tensor(name, array)
  if tokenizer:
    add_tokenizer(writer)
  for add in (
    writer.write_header_to_file,
    writer.write_kv_data_to_file,
    writer.write_tensors_to_file,
    writer.close,
  ):
    add()
  return values


def in_halves(array, heads):
  """Row `2i` of each head to `i`, row `2i + 1` to `i + H/2`."""
  rows = np.arange(len(array)).reshape(heads, -1)
  return array[np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1).reshape(-1)]


def test_every_form_is_decoded_and_rows_are_in_the_order_of_rotations(tmp_path):
  values = write(tmp_path / 'model.gguf')
  model, params = load(tmp_path / 'model.gguf')
  assert (model.heads, model.kv_heads, model.layers, model.vocab) == (N, K, 1, V)
  assert (model.norm_eps, model.rope_theta, model.tied) == (1e-5, 100_000.0, True)
  block = jax.tree.map(lambda x: np.asarray(x[0]), params['blocks'])
  found = {f'blk.0.ffn_{name}': block['mlp'][name]['kernel'].T for name in ('gate', 'up', 'down')}
  found |= {
    'blk.0.attn_v': block['attn']['v']['kernel'].T,
    'blk.0.attn_output': block['attn']['o']['kernel'].T,
    'blk.0.attn_norm': block['attn_norm']['scale'],
    'blk.0.ffn_norm': block['mlp_norm']['scale'],
    'token_embd': params['embed']['embedding'],
    'output_norm': params['final_norm']['scale'],
  }
  for name, array in found.items():
    np.testing.assert_allclose(array, values[name], rtol=1e-6, atol=1e-6, err_msg=name)
  for name, heads in (('q', N), ('k', K)):
    expected = in_halves(values[f'blk.0.attn_{name}'], heads)
    np.testing.assert_allclose(block['attn'][name]['kernel'].T, expected, rtol=1e-6, atol=1e-6)


def test_qwen_has_biases_and_its_own_order_of_rows(tmp_path):
  tensors = {name: ('f32', shape) for name, (_, shape) in TENSORS.items()} | {
    'output': ('f32', (V, D)),
    'blk.0.attn_q.bias': ('f32', (D,)),
    'blk.0.attn_k.bias': ('f32', (K * H,)),
    'blk.0.attn_v.bias': ('f32', (K * H,)),
  }
  values = write(tmp_path / 'model.gguf', 'qwen2', tensors)
  model, params = load(tmp_path / 'model.gguf', 'bfloat16')
  assert (model.qkv_bias, model.tied) == (True, False)
  query = params['blocks']['attn']['q']
  same = lambda found, name, turn=False: np.testing.assert_array_equal(
    np.asarray(found.T if turn else found), values[name].astype(jnp.bfloat16)
  )
  same(query['kernel'][0], 'blk.0.attn_q', turn=True)
  same(query['bias'][0], 'blk.0.attn_q.bias')
  same(params['head']['kernel'], 'output', turn=True)


def test_a_field_that_is_missing_is_named(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama')
  for add in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
    add()
  with pytest.raises(ValueError, match=r"model.gguf: 'hidden_size' is missing"):
    load(tmp_path / 'model.gguf')


def test_scaled_rotations_are_recognised(tmp_path):
  scaling = RopeScaling(factor=32.0)
  factors = frequencies(H, 100_000.0) / frequencies(H, 100_000.0, scaling)
  write(tmp_path / 'model.gguf', extra=[('rope_freqs.weight', factors)])
  assert huggingface.describe(tmp_path / 'model.gguf').rope_scaling == scaling
  write(
    tmp_path / 'other.gguf', extra=[('rope_freqs.weight', np.linspace(1, 9, H // 2, dtype='f'))]
  )
  with pytest.raises(ValueError, match=r"other.gguf: tensor 'rope_freqs.weight' slows rotations"):
    load(tmp_path / 'other.gguf')


def test_what_cannot_be_read_is_refused_by_file_and_key(tmp_path):
  with pytest.raises(ValueError, match='there is no file'):
    load(tmp_path / 'model.gguf')
  path = tmp_path / 'model.gguf'
  write(path, 'gemma')
  with pytest.raises(ValueError, match=r"model.gguf: 'general.architecture' 'gemma' is not supp"):
    load(path)
  write(path, rope__scaling__type='yarn')
  with pytest.raises(ValueError, match=r"'llama.rope.scaling.type' is 'yarn'"):
    load(path)
  write(path, tensors={k: v for k, v in TENSORS.items() if 'ffn_up' not in k})
  with pytest.raises(
    ValueError, match=r"model.gguf: tensor 'model.layers.0.mlp.up_proj.weight' is"
  ):
    load(path)
  write(path)
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(ValueError, match=r'model.gguf \([\d,]+ bytes\) is not a whole GGUF file'):
    load(path)


# The tokenizer.


def add_tokenizer(writer, **fields):
  """Pieces of single letters, of two words, and three that are no text."""
  pieces = ['<|end|>', '<|user|>', 'a', 'b', 'c', 'ab', 'abc', '\u0120', '1', '\u0120ab']
  merges = ['a b', 'ab c', '\u0120 ab']
  writer.add_tokenizer_model(fields.get('model', 'gpt2'))
  writer.add_tokenizer_pre(fields.get('pre', 'smollm'))
  writer.add_token_list(pieces)
  writer.add_token_types([3, 3] + [1] * (len(pieces) - 2))
  writer.add_token_merges(merges)
  writer.add_eos_token_id(0)
  if 'bos' in fields:
    writer.add_bos_token_id(fields['bos'])
    writer.add_add_bos_token(True)
  return pieces


def write_tokenizer(path, **fields):
  """Writes a file without a model."""
  writer = gguf.GGUFWriter(path, 'llama')
  pieces = add_tokenizer(writer, **fields)
  for add in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
    add()
  return pieces


def test_a_folder_made_of_a_file_has_its_tokenizer_and_token_ids(tmp_path):
  file, folder = tmp_path / 'model.gguf', tmp_path / 'folder'
  write(file, tokenizer=True)
  model, params = load(file)
  huggingface.save(folder, model, params, like=file)
  where = dict(vocab_size=V, cache_dir=tmp_path)
  theirs, ours = (open_tokenizer(str(p), None, **where) for p in (file, folder / 'tokenizer.json'))
  assert ours.encode('abc ab11') == theirs.encode('abc ab11')
  assert (
    ours.eos_id == theirs.eos_id == json.loads((folder / 'config.json').read_text())['eos_token_id']
  )
  assert json.loads((folder / 'tokenizer_config.json').read_text())['eos_token'] == '<|end|>'
  write(file)
  with pytest.warns(UserWarning, match=r"no tokenizer is written.*'tokenizer.ggml.model' is None"):
    huggingface.save(tmp_path / 'other', model, params, like=file)
  assert load(tmp_path / 'other')[0] == model


def test_text_is_cut_into_the_pieces_of_the_file(tmp_path):
  pieces = write_tokenizer(tmp_path / 'model.gguf')
  cut = open_tokenizer(str(tmp_path / 'model.gguf'), None, vocab_size=10, cache_dir=tmp_path)
  assert [pieces[i] for i in cut.encode('abc ab11')] == ['abc', '\u0120ab', '1', '1']
  assert cut.decode(cut.encode('abc ab11')) == 'abc ab11'
  assert (cut.eos_id, cut.vocab_size) == (0, 10)
  assert 1 not in cut.encode('a<|user|>a')  # Text never becomes a control token.
  text, eos = tokenizer_json(tmp_path / 'model.gguf')
  assert (json.loads(text)['model']['type'], eos) == ('BPE', 0)
  with pytest.raises(ValueError, match=r"model.gguf' has token ids up to 9, .* of 9; set"):
    open_tokenizer(str(tmp_path / 'model.gguf'), None, vocab_size=9, cache_dir=tmp_path)


def test_words_are_cut_as_the_file_says(tmp_path):
  pieces = write_tokenizer(tmp_path / 'model.gguf', pre='llama-bpe', bos=1)
  cut = open_tokenizer(str(tmp_path / 'model.gguf'), None, vocab_size=10, cache_dir=tmp_path)
  assert cut.frame.first == (1,)
  # The text's pieces are those of the file, and what is put before them is not of the text.
  assert [pieces[i] for i in cut.encode(' ab1c')] == ['\u0120ab', '1', 'c']
  text, _ = tokenizer_json(tmp_path / 'model.gguf')
  assert json.loads(text)['model']['ignore_merges']


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  (tmp_path / 'model.gguf').write_bytes(b'GGUF')
  with pytest.raises(ImportError, match=r"pip install 'memjax\[gguf\]'"):
    load(tmp_path / 'model.gguf')


@pytest.mark.parametrize(('field', 'value'), [('model', 'llama'), ('pre', 'qwen3')])
def test_other_tokenizers_are_refused(field, value, tmp_path):
  write_tokenizer(tmp_path / 'model.gguf', **{field: value})
  with pytest.raises(ValueError, match=rf"model.gguf: 'tokenizer.ggml.{field}' .*'{value}'"):
    tokenizer_json(tmp_path / 'model.gguf')
