"""Folders written and read again, how they are read, and what is said of damaged ones."""

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make, random_params

from memjax import adapters, sharding, weights
from memjax.models import create, huggingface
from memjax.models.huggingface import checkpoint, families
from memjax.models.huggingface.family import Rule
from memjax.models.rotary import RopeScaling

small_opt = functools.partial(
  create, 'opt_tiny', vocab=64, hidden=32, intermediate=48, positions=16
)

# Family written -> models. Layers enough that their order could be wrong.
MODELS = {
  'llama': make(layers=3),
  'llama_scaled': make(rope_theta=100.0, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32)),
  'llama_tied': make(tied=True, norm_eps=1e-5),
  'mistral': make(window=4, head_dim=12),
  'qwen2': make(qkv_bias=True),
  'qwen2_window': make(qkv_bias=True, window=3),
  'qwen3': make(qk_norm=True, head_dim=12, tied=True),
  'opt': small_opt(),
  'opt_350m': small_opt(pre_norm=False, embed_dim=16, tied=False),
}


def assert_equal(ours, theirs):
  """Bit for bit."""
  check = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
  jax.tree.map(check, ours, theirs)


def edit_config(folder, **fields):
  path = folder / 'config.json'
  config = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({k: v for k, v in config.items() if v is not Ellipsis}))


def edit_tensors(folder, change):
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


@pytest.fixture
def folder(tmp_path):
  """A whole LLaMA."""
  model = make()
  huggingface.save(tmp_path / 'model', model, random_params(model))
  return tmp_path / 'model'


# Round trips.


@pytest.mark.parametrize('name', MODELS)
def test_what_was_saved_is_loaded_bit_for_bit(name, tmp_path):
  model = MODELS[name]
  params = random_params(model)
  huggingface.save(tmp_path / 'model', model, params)
  config = json.loads((tmp_path / 'model/config.json').read_text())
  assert config['model_type'] == name.split('_')[0]
  again, loaded = huggingface.load(tmp_path / 'model')
  assert again == model
  assert again == huggingface.describe(tmp_path / 'model')
  assert_equal(loaded, params)


def test_fused_tensors_are_split_and_joined(tmp_path):
  """Phi-3's, whose rows are written down here by hand."""
  model = make(window=4)
  params = random_params(model)
  (tmp_path / 'like').mkdir()
  phi3 = families.FAMILIES['phi3'].to_config(model) | {'eos_token_id': 5}
  (tmp_path / 'like/config.json').write_text(json.dumps(phi3))
  (tmp_path / 'like/tokenizer.json').write_text('{}')
  huggingface.save(tmp_path / 'model', model, params, like=tmp_path / 'like')
  tensors = load_file(tmp_path / 'model/model.safetensors')
  blocks = params['blocks']
  qkv = [blocks['attn'][name]['kernel'][1].T for name in 'qkv']
  np.testing.assert_array_equal(
    tensors['model.layers.1.self_attn.qkv_proj.weight'], np.concatenate(qkv)
  )
  gate_up = [blocks['mlp'][name]['kernel'][0].T for name in ('gate', 'up')]
  np.testing.assert_array_equal(
    tensors['model.layers.0.mlp.gate_up_proj.weight'], np.concatenate(gate_up)
  )
  assert json.loads((tmp_path / 'model/config.json').read_text())['eos_token_id'] == 5
  assert (tmp_path / 'model/tokenizer.json').exists()
  again, loaded = huggingface.load(tmp_path / 'model')
  assert again == model
  assert_equal(loaded, params)


def test_rules_find_a_part_of_ours_in_theirs():
  theirs = np.arange(60).reshape(10, 6)
  ours = theirs[4:8].T
  rule = Rule(transpose=True, start=4, stop=8)
  index = (slice(2, 5), slice(1, None))
  np.testing.assert_array_equal(theirs[rule.index(index, ours.shape)].T, ours[index])
  columns = Rule(axis=1, start=2, stop=6)
  index = (slice(None), slice(1, 3))
  np.testing.assert_array_equal(theirs[columns.index(index, (10, 4))], theirs[:, 2:6][index])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_16_bits_stay_as_they_are_unless_asked(dtype, tmp_path):
  model = make(param_dtype=dtype, dtype=dtype)
  params = random_params(model)
  huggingface.save(tmp_path / 'model', model, params)
  again, loaded = huggingface.load(tmp_path / 'model')
  assert again == model
  assert_equal(loaded, params)
  again, loaded = huggingface.load(tmp_path / 'model', 'float32', remat='none')
  assert again == dataclasses.replace(model, dtype='float32', param_dtype='float32', remat='none')
  assert_equal(loaded, jax.tree.map(np.float32, params))


def test_several_files_with_an_index(tmp_path):
  model = make(layers=3)
  params = random_params(model)
  huggingface.save(tmp_path / 'model', model, params, shard_bytes=20_000)
  files = sorted((tmp_path / 'model').glob('*.safetensors'))
  assert len(files) > 3
  assert all(file.stat().st_size < 24_000 for file in files)
  index = json.loads((tmp_path / 'model/model.safetensors.index.json').read_text())
  total = sum(x.size * 4 for x in jax.tree.leaves(params))
  assert index['metadata']['total_size'] == total
  for file in files:  # The library's own reader agrees, and the index names what is there.
    assert {index['weight_map'][key] for key in load_file(file)} == {file.name}
  assert_equal(huggingface.load(tmp_path / 'model')[1], params)


def test_weights_that_are_no_arrays_are_written_as_what_they_stand_for(tmp_path):
  model = make()
  params = random_params(model)
  up = params['blocks']['mlp']['up']
  dense = np.asarray(up['kernel'])
  up['kernel'] = stored = jax.lax.map(weights.quantise, up['kernel'])
  huggingface.save(tmp_path / 'model', model, params)
  _, loaded = huggingface.load(tmp_path / 'model')
  found = np.asarray(loaded['blocks']['mlp']['up']['kernel'])
  np.testing.assert_array_equal(found, np.asarray(weights.materialize(stored)))
  assert (found != dense).any()


def test_an_adapter_is_written_as_the_matrix_that_it_makes(tmp_path):
  model = make()
  params = random_params(model)
  spec = adapters.LoRA(rank=2, targets='attn/(q|v)', alpha=8.0)
  adapted = adapters.attach(params, spec, jax.random.key(0))
  q = adapted['blocks']['attn']['q']['kernel']
  b = np.random.default_rng(0).standard_normal(q.b.shape).astype(np.float32)
  adapted['blocks']['attn']['q']['kernel'] = dataclasses.replace(q, b=jnp.asarray(b))
  huggingface.save(tmp_path / 'model', model, adapted)
  _, loaded = huggingface.load(tmp_path / 'model')
  attn = params['blocks']['attn']
  expected = np.asarray(attn['q']['kernel']) + 8 / 2 * np.asarray(q.a) @ b
  np.testing.assert_allclose(loaded['blocks']['attn']['q']['kernel'], expected, atol=1e-5)
  assert_equal(loaded['blocks']['attn']['v'], attn['v'])


# Where parameters end up, and what is held on the way.


def test_every_device_reads_its_own_part(folder, monkeypatch):
  model, sizes = make(), []
  read = checkpoint.SafeTensors.read

  def noted(self, key, index):
    part = read(self, key, index)
    sizes.append((key, part.size))
    return part

  monkeypatch.setattr(checkpoint.SafeTensors, 'read', noted)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  _, params = huggingface.load(folder, mesh=mesh)
  assert_equal(params, random_params(model))
  expected = sharding.param_shardings(model.abstract(), model.SHARDING, mesh)
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, expected)
  assert all(jax.tree.leaves(same))
  # Four parts of each layer, each read once though two devices hold it.
  assert [size for key, size in sizes if 'up_proj' in key] == 2 * 4 * [32 * 48 // 4]


def test_parameters_can_go_to_host_memory(folder):
  model = make()
  mesh = sharding.make_mesh(data=4, fsdp=2)
  places = sharding.param_shardings(model.abstract(), model.SHARDING, mesh)
  places['blocks'] = jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), places['blocks'])
  _, params = huggingface.load(folder, shardings=places)
  assert_equal(params, random_params(model))
  assert params['blocks']['attn']['q']['kernel'].sharding.memory_kind == 'pinned_host'


def test_host_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
  """What numpy holds; parameters themselves are XLA's, as on a device."""
  model = make(hidden=128, intermediate=256, layers=24)
  params = random_params(model)
  tensor, total = 4 * 128 * 256, sum(x.nbytes for x in jax.tree.leaves(params))
  assert total > 80 * tensor
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind='pinned_host')
  in_host = jax.tree.map(lambda _: host, params)
  for work in (
    lambda: huggingface.save(tmp_path / 'model', model, params),
    lambda: huggingface.load(tmp_path / 'model'),
    lambda: huggingface.load(tmp_path / 'model', shardings=in_host),
  ):
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What was read, its transpose, and the compiler's own Python objects.
    assert tensor <= peak < 12 * tensor


# Bad inputs: the file and the key are named.


def without(key):
  return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(key))


def put(key, array):
  return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({key: array}))


def config(**fields):
  return lambda folder: edit_config(folder, **fields)


def truncate(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder):
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'')


def only_gguf(folder):
  (folder / 'config.json').unlink()
  (folder / 'llama.gguf').write_bytes(b'')


def index_of_numbers(folder):
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {UP: 1}}))


def lose_a_file(folder):
  (folder / 'model.safetensors').unlink()
  index = {'weight_map': {'model.norm.weight': 'model-00001-of-00002.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


UP = 'model.layers.1.mlp.up_proj.weight'
# What is done to a whole LLaMA -> what the error says.
DAMAGES = {
  'missing_tensor': (without(UP), rf"tensor '{UP}' is missing, which 'blocks/mlp/up/kernel'"),
  'extra_tensor': (
    put('model.extra', np.zeros(3)),
    r"safetensors: tensor 'model.extra' belongs to",
  ),
  'extra_layer': (config(num_hidden_layers=1), r'model\.layers\.1\..* belongs to no parameter'),
  'wrong_shape': (put(UP, np.zeros((48, 33))), rf"'{UP}' has shape \(48, 33\).* it \(48, 32\)"),
  'transposed': (put(UP, np.zeros((32, 48))), rf"'{UP}' has shape"),
  'integers': (put(UP, np.zeros((48, 32), np.int8)), rf"'{UP}' is not of a floating dtype"),
  'unknown': (
    config(architectures=['LlamaForCasualLM']),
    r"config.json: 'arch.*'LlamaForCausalLM'",
  ),
  'unknown_type': (config(architectures=..., model_type='lama'), r"'lama'.* nearest is 'llama'"),
  'sizes': (config(num_key_value_heads=3), r'config.json: heads 4 is not a multiple of kv_heads 3'),
  'missing_field': (config(hidden_size=...), r"config.json: 'hidden_size' is missing"),
  'activation': (config(hidden_act='gelu'), r"config.json: 'hidden_act' is 'gelu'"),
  'biases': (config(attention_bias=True), r"config.json: 'attention_bias' is True"),
  'rotation': (config(rope_scaling={'type': 'yarn'}), r"config.json: 'rope_scaling' .*'yarn'"),
  'rotation_field': (config(rope_scaling={'rope_type': 'llama3'}), r"rope_scaling'?: 'factor' is"),
  'truncated': (truncate, r'model.safetensors \([\d,]+ bytes\) is not a whole'),
  'pickle': (only_pickle, r'pytorch_model.bin .*once: python .* import LlamaForCausalLM'),
  'lost_file': (lose_a_file, r'index.json names model-00001-of-00002.safetensors, which is not'),
  'index': (index_of_numbers, r"index.json has no 'weight_map' from tensors to files"),
  'no_weights': (
    lambda f: (f / 'model.safetensors').unlink(),
    r'has neither model.safetensors nor',
  ),
  'gguf': (only_gguf, r'has no config.json; its llama.gguf is loaded by its own path'),
  'no_config': (lambda f: (f / 'config.json').unlink(), r'has no config.json'),
  'no_json': (lambda f: (f / 'config.json').write_text('{'), r'config.json is not JSON'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_folder_is_refused_by_file_and_key(name, folder):
  damage, message = DAMAGES[name]
  damage(folder)
  with pytest.raises(ValueError, match=message):
    huggingface.load(folder)


def test_a_file_of_a_folder_is_not_taken_for_it(folder):
  (folder / 'pytorch_model.bin').write_bytes(b'')
  for name in ('pytorch_model.bin', 'model.safetensors'):
    with pytest.raises(ValueError, match=rf'{name} is a file; give the folder that it is in'):
      huggingface.load(folder / name)


def test_longrope_of_phi3_is_refused(folder):
  edit_config(folder, architectures=['Phi3ForCausalLM'], rope_scaling={'type': 'longrope'})
  with pytest.raises(ValueError, match="'rope_scaling' is of type 'longrope'"):
    huggingface.load(folder)


def test_a_window_in_some_layers_only_is_refused(folder):
  window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
  edit_config(folder, architectures=['Qwen2ForCausalLM'], **window)
  with pytest.raises(ValueError, match="'max_window_layers' leaves 1 of 2 layers without"):
    huggingface.load(folder)


def test_what_holds_nothing_of_its_own_is_passed_over(tmp_path):
  model = make(tied=True)
  params = random_params(model)
  huggingface.save(tmp_path / 'model', model, params)
  copy = np.asarray(params['embed']['embedding'])
  put('lm_head.weight', copy)(tmp_path / 'model')
  put('model.layers.0.self_attn.rotary_emb.inv_freq', np.ones(4))(tmp_path / 'model')
  assert_equal(huggingface.load(tmp_path / 'model')[1], params)


def test_an_unknown_field_and_a_missing_folder(folder, tmp_path):
  with pytest.raises(ValueError, match="Llama has no field 'remt'; the nearest is 'remat'"):
    huggingface.load(folder, remt='full')
  with pytest.raises(ValueError, match='there is no folder'):
    huggingface.load(tmp_path / 'nowhere')


def test_save_refuses_what_it_cannot_write_and_leaves_nothing(folder, tmp_path):
  model = make()
  params = random_params(model)
  with pytest.raises(ValueError, match='exists already; choose another'):
    huggingface.save(folder, model, params)
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match="model needs the parameter 'head/kernel'"):
    huggingface.save(out, model, {k: v for k, v in params.items() if k != 'head'})
  both = make(qkv_bias=True, qk_norm=True)
  with pytest.raises(ValueError, match='no Hugging Face family has the fields'):
    huggingface.save(out, both, random_params(both))
  with pytest.raises(ValueError, match=r"'embed/embedding' has shape \(64, 32\), .* \(65, 32\)"):
    huggingface.save(out, make(vocab=65), params)
  broken = dict(params, final_norm={'scale': jnp.ones(32, jnp.int8)})
  with pytest.raises(ValueError, match="'final_norm/scale' is int8"):
    huggingface.save(out, model, broken)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
