"""Sizes against the published ones, and names that are nearly right."""

import pytest

from memjax.models import PRESETS, create

# Millions of parameters: the tables of the papers' code, and the sizes of the released checkpoints.
PUBLISHED = {
  'llama_60m': 58.07,
  'llama_130m': 134.11,
  'llama_350m': 367.97,
  'llama_1b': 1339.08,
  'llama_7b': 6738.42,
  'llama2_7b': 6738.42,
  'llama2_13b': 13015.86,
  'llama2_70b': 68976.65,
  'llama3_8b': 8030.26,
  'llama3_70b': 70553.71,
  'llama3_1_8b': 8030.26,
  'llama3_2_1b': 1235.81,
  'llama3_2_3b': 3212.75,
  'smollm2_135m': 134.52,
  'mistral_7b': 7241.73,
  'qwen2_0_5b': 494.03,
  'qwen2_1_5b': 1543.71,
  'qwen2_7b': 7615.62,
  'qwen3_0_6b': 596.05,
  'qwen3_1_7b': 1720.57,
  'qwen3_8b': 8190.74,
  'phi3_mini': 3821.08,
  'llama_quickstart': 10.52,
  'opt_125m': 125.24,
  'opt_350m': 331.20,
  'opt_1_3b': 1315.76,
  'opt_2_7b': 2651.60,
  'opt_6_7b': 6658.47,
  'opt_13b': 12853.47,
  'opt_30b': 29974.54,
  'opt_66b': 65719.70,
  'opt_175b': 174604.47,
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_counts(name):
  assert round(create(name).num_params() / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_a_valid_model(name):
  model = create(name, dtype='bfloat16')
  assert model.heads % model.kv_heads == 0
  assert model.dtype.itemsize == 2


def test_unknown_names_are_answered_with_the_nearest():
  with pytest.raises(ValueError, match="the nearest is 'llama_60m'"):
    create('llama_60M')
  with pytest.raises(ValueError, match="no field 'kv_head'; the nearest is 'kv_heads'"):
    create('llama_tiny', kv_head=2)
  with pytest.raises(ValueError, match=r'there are .*llama_7b'):
    create('xyz')
