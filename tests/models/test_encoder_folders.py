"""Folders of GPT-2, Phi and encoders: written, read again, and with another head."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_params

from memjax.models import create, huggingface

SMALL = dict(vocab=64, hidden=16, intermediate=24, layers=3)
ENCODER = dict(**SMALL, positions=16)
ROBERTA = dict(**ENCODER, types=1, offset=2, pad_id=1, norm_eps=1e-5)

# Name, beginning with the family's -> model. Layers enough that their order could be wrong.
MODELS = {
  'gpt2': create('gpt2_tiny', positions=16, **SMALL),
  'gpt2_untied': create('gpt2_tiny', positions=16, tied=False, **SMALL),
  'phi': create('phi_tiny', rotary_dim=2, kv_heads=2, **SMALL),
  'bert': create('bert_tiny', labels=3, **ENCODER),
  'bert_mean': create('bert_tiny', labels=3, pool='mean', **ENCODER),
  'bert_regression': create('bert_tiny', task='regression', **ENCODER),
  'bert_embedding': create('bert_tiny', task='embedding', pool='mean', **ENCODER),
  'bert_first': create('bert_tiny', task='embedding', **ENCODER),
  'roberta': create('bert_tiny', labels=3, **ROBERTA),
  'roberta_span': create('bert_tiny', task='span', **ROBERTA),
}


def write(folder, name):
  params = random_params(MODELS[name])
  huggingface.save(folder, MODELS[name], params)
  return params


def assert_equal(ours, theirs):
  """Bit for bit."""
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, theirs)


@pytest.mark.parametrize('name', MODELS)
def test_what_was_saved_is_loaded_bit_for_bit(name, tmp_path):
  params = write(tmp_path / 'model', name)
  config = json.loads((tmp_path / 'model/config.json').read_text())
  assert config['model_type'] == name.split('_')[0]
  model, loaded = huggingface.load(tmp_path / 'model')
  assert model == MODELS[name]
  assert_equal(loaded, params)


def test_queries_keys_and_values_of_gpt2_lie_side_by_side(tmp_path):
  params = write(tmp_path / 'model', 'gpt2')
  tensors = load_file(tmp_path / 'model/model.safetensors')
  attn = params['blocks']['attn']
  for theirs, ours in (('weight', 'kernel'), ('bias', 'bias')):
    expected = np.concatenate([attn[name][ours][2] for name in 'qkv'], axis=-1)
    np.testing.assert_array_equal(tensors[f'transformer.h.2.attn.c_attn.{theirs}'], expected)


def test_a_new_head_is_drawn_by_its_key_and_named(tmp_path):
  params = write(tmp_path / 'model', 'bert_embedding')
  head = dict(task='classification', labels=4, pool='mean')
  with pytest.warns(UserWarning, match='has no head/out/kernel, head/out/bias: drawn'):
    model, first = huggingface.load(tmp_path / 'model', key=jax.random.key(1), **head)
  with pytest.warns(UserWarning, match='drawn'):
    _, second = huggingface.load(tmp_path / 'model', key=jax.random.key(2), **head)
  drawn = first.pop('head')
  assert drawn['out']['kernel'].shape == (16, 4)
  expected = jax.jit(lambda key: model.init(key)['head'])(jax.random.key(1))
  assert_equal(drawn, expected)
  assert not (drawn['out']['kernel'] == second['head']['out']['kernel']).any()
  assert_equal(first, params)


def test_a_head_with_another_number_of_labels_is_refused(tmp_path):
  write(tmp_path / 'model', 'roberta')
  with pytest.raises(ValueError, match=r"'classifier.out_proj.weight' has shape \(3, 16\)"):
    huggingface.load(tmp_path / 'model', labels=5)


def test_norms_may_be_spelt_as_in_the_released_bert(tmp_path):
  params = write(tmp_path / 'model', 'bert')
  file = tmp_path / 'model/model.safetensors'
  older = lambda key: key.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')
  tensors = load_file(file)
  assert any(older(key) != key for key in tensors)
  save_file({older(key): tensor for key, tensor in tensors.items()}, file)
  assert_equal(huggingface.load(tmp_path / 'model')[1], params)


def test_configs_that_compute_something_else_are_refused(tmp_path):
  write(tmp_path / 'model', 'bert')
  path = tmp_path / 'model/config.json'
  config = json.loads(path.read_text())
  for field, value in (
    ('hidden_act', 'relu'),
    ('position_embedding_type', 'relative_key'),
    ('problem_type', 'multi_label_classification'),
  ):
    path.write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f'config.json: {field!r} is {value!r}'):
      huggingface.describe(tmp_path / 'model')
