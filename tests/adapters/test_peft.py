"""Adapters as folders of `peft`: round trips, folders made by hand, and the package itself."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax import adapters, sharding, weights
from memjax.models import create

MODEL = create('llama_tiny', vocab=32, hidden=16, intermediate=24, heads=4, kv_heads=2, layers=2)
TOKENS = jnp.arange(12).reshape(2, 6)


@functools.cache
def plain():
  return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture
def params():
  return jax.tree.map(lambda x: x, plain())


@functools.cache
def _trained(spec):
  adapted = jax.jit(lambda p: adapters.attach(p, spec, jax.random.key(0)))(plain())
  rng = np.random.default_rng(0)
  move = lambda x: jnp.asarray(np.asarray(x) + 0.2 * rng.standard_normal(x.shape), x.dtype)
  return weights.replaced(adapted, jax.tree.map(move, adapters.trainable(adapted)))


def trained(spec):
  """Adapted parameters of which no part is zero."""
  return jax.tree.map(lambda x: x, _trained(spec))


def edit(folder, **fields):
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  'spec',
  [
    adapters.LoRA(rank=4, alpha=6, targets='attn/(q|v)/'),
    adapters.LoRA(rank=4, rank_stabilized=True, dtype='bfloat16'),
    adapters.DoRA(rank=2, targets='mlp/'),
  ],
  ids=['lora', 'rslora', 'dora'],
)
def test_what_is_written_is_read_again(spec, params, tmp_path):
  ours = trained(spec)
  adapters.save_peft(tmp_path, ours, MODEL)
  again = adapters.load_peft(tmp_path, params, MODEL)
  jax.tree.map(np.testing.assert_array_equal, adapters.trainable(again), adapters.trainable(ours))
  scale = lambda leaf: getattr(leaf, 'adapted', leaf).scale
  path = ('mlp', 'up') if spec.targets == 'mlp/' else ('attn', 'q')
  leaves = [p['blocks'][path[0]][path[1]]['kernel'] for p in (ours, again)]
  assert scale(leaves[0]) == pytest.approx(scale(leaves[1]), rel=1e-12)
  assert isinstance(again['final_norm']['scale'], weights.Frozen)


def test_a_file_holds_what_the_format_says(params, tmp_path):
  ours = trained(adapters.LoRA(rank=3, alpha=6, targets='attn/q'))
  adapters.save_peft(tmp_path, ours, MODEL, base='some/model')
  tensors = load_file(tmp_path / 'adapter_model.safetensors')
  module = 'base_model.model.model.layers.{}.self_attn.q_proj'
  assert set(tensors) == {
    f'{module.format(i)}.lora_{part}.weight' for i in range(2) for part in 'AB'
  }
  leaf = ours['blocks']['attn']['q']['kernel']
  np.testing.assert_array_equal(tensors[f'{module.format(1)}.lora_A.weight'], leaf.a[1].T)
  np.testing.assert_array_equal(tensors[f'{module.format(1)}.lora_B.weight'], leaf.b[1].T)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert (config['r'], config['lora_alpha'], config['target_modules']) == (3, 6, ['q_proj'])
  assert config['base_model_name_or_path'] == 'some/model'


def test_factors_lie_like_the_weight_they_adapt(params, tmp_path):
  adapters.save_peft(tmp_path, trained(adapters.LoRA(rank=4)), MODEL)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed = jax.device_put(params, sharding.param_shardings(params, MODEL.SHARDING, mesh))
  down = adapters.load_peft(tmp_path, placed, MODEL)['blocks']['mlp']['down']['kernel']
  assert tuple(down.base.sharding.spec) == (None, 'tensor', 'fsdp')
  assert tuple(down.a.sharding.spec) == (None, 'tensor', None)
  assert tuple(down.b.sharding.spec) == (None, None, 'fsdp')


def test_ranks_and_scales_may_differ_between_leaves(params, tmp_path):
  one = trained(adapters.LoRA(rank=4, alpha=2, targets='attn/'))
  two = trained(adapters.LoRA(rank=2, alpha=5, targets='mlp/up'))
  one['blocks']['mlp'] = two['blocks']['mlp']
  adapters.save_peft(tmp_path, one, MODEL)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  up = [f'model.layers.{i}.mlp.up_proj' for i in range(2)]
  assert config['rank_pattern'] == dict.fromkeys(up, 2)
  assert config['alpha_pattern'] == dict.fromkeys(up, 5)
  again = adapters.load_peft(tmp_path, params, MODEL)['blocks']['mlp']['up']['kernel']
  assert (again.scale, again.b.shape) == (2.5, (2, 2, 24))


def test_parts_of_one_matrix_share_its_adapter(params, tmp_path):
  """Phi-3 has one matrix for queries, keys and values, and so one adapter."""
  from memjax.models.huggingface import families

  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (32, 2)))
  tensors = {}
  for i in range(2):
    module = f'base_model.model.model.layers.{i}.self_attn.qkv_proj'
    tensors |= {f'{module}.lora_A.weight': a, f'{module}.lora_B.weight': b + i}
  save_file(tensors, tmp_path / 'adapter_model.safetensors')
  fields = dict(peft_type='LORA', r=2, lora_alpha=2, target_modules=['qkv_proj'])
  (tmp_path / 'adapter_config.json').write_text(json.dumps(fields))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(families, 'of_model', lambda model: families.FAMILIES['phi3'])
    attn = adapters.load_peft(tmp_path, params, MODEL)['blocks']['attn']
    for name, rows in zip('qkv', (slice(0, 16), slice(16, 24), slice(24, 32))):
      np.testing.assert_array_equal(attn[name]['kernel'].a[1], a.T)
      np.testing.assert_array_equal(attn[name]['kernel'].b[1], (b + 1)[rows].T)
    ours = trained(adapters.LoRA(rank=2, targets='attn/q'))
    with pytest.raises(ValueError, match=r"^blocks/attn/q/kernel is part of .*qkv_proj'"):
      adapters.save_peft(tmp_path / 'other', ours, MODEL)


QUERIES = adapters.LoRA(rank=4, targets='attn/(q|v)/')


def saved(folder, spec=QUERIES):
  adapters.save_peft(folder, trained(spec), MODEL)
  return folder


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    (dict(peft_type='IA3'), r"'peft_type' is 'IA3'"),
    (dict(modules_to_save=['lm_head']), r"'modules_to_save' is \['lm_head'\]"),
    (dict(init_lora_weights='pissa'), r"'init_lora_weights' is 'pissa', which changes the weights"),
    (dict(target_modules=['q_proj', 'k_proj']), r"names 'k_proj', of which .* no tensor"),
    (dict(use_dora=True), r"q_proj\.lora_magnitude_vector' is missing"),
    (dict(r=8), r"q_proj' have ranks 4 and 4, where .* says 8"),
    (dict(alpha_pattern={'layers.1.self_attn.q_proj': 9}), 'differ from layer to layer'),
  ],
)
def test_a_config_that_is_not_understood_is_refused(fields, error, params, tmp_path):
  edit(saved(tmp_path), **fields)
  with pytest.raises(ValueError, match=error):
    adapters.load_peft(tmp_path, params, MODEL)


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    (
      lambda t, q: t.update({f'{q}.lora_A.weight': np.ones((4, 12), np.float32)}),
      r'blocks/attn/q/kernel is \[16, 16\], but its adapter .* one of \[12, 16\]: .*another model',
    ),
    (lambda t, q: t.pop(f'{q}.lora_B.weight'), r"layers.1.self_attn.q_proj.lora_B.weight' is miss"),
    (
      lambda t, q: [t.pop(f'{q}.lora_{part}.weight') for part in 'AB'],
      'blocks/attn/q/kernel is adapted in some layers, but not in layer 1',
    ),
    (
      lambda t, q: t.update(
        {f'{q}_x.lora_{part}.weight': t.pop(f'{q}.lora_{part}.weight') for part in 'AB'}
      ),
      r"q_proj_x' is adapted there, but .* the nearest is 'model.layers.1.self_attn.q_proj'",
    ),
    (lambda t, q: t.update({'x.weight': np.ones(2)}), r"tensor 'x.weight' is no part of a LoRA"),
  ],
)
def test_a_file_of_another_model_is_refused_by_leaf(change, error, params, tmp_path):
  file = saved(tmp_path) / 'adapter_model.safetensors'
  tensors = load_file(file)
  change(tensors, 'base_model.model.model.layers.1.self_attn.q_proj')
  save_file(tensors, file)
  with pytest.raises(ValueError, match=error):
    adapters.load_peft(tmp_path, params, MODEL)


def test_folders_without_the_files_are_refused(params, tmp_path):
  with pytest.raises(ValueError, match=r'has no adapter_config\.json'):
    adapters.load_peft(tmp_path, params, MODEL)
  file = saved(tmp_path) / 'adapter_model.safetensors'
  file.rename(tmp_path / 'adapter_model.bin')
  with pytest.raises(ValueError, match='Reading a pickle runs what is in it'):
    adapters.load_peft(tmp_path, params, MODEL)


def test_what_the_format_cannot_hold_is_refused_by_leaf(params, tmp_path):
  with pytest.raises(ValueError, match=r'^blocks/attn/q/kernel: a BlockDiagonal is nothing'):
    saved(tmp_path, adapters.MELoRA(rank=2, blocks=2, targets='attn/q'))
  with pytest.raises(ValueError, match=r'^final_norm/scale: an array that is trained'):
    saved(tmp_path, adapters.LoRA(rank=2, targets='attn/q', rest='final_norm'))
  for spec in (adapters.ReLoRA(rank=2, rest=''), adapters.SwitchLoRA(rank=2, rest='')):
    with pytest.raises(ValueError, match=r'^blocks/attn/k/kernel: .* since the last restart'):
      saved(tmp_path, spec)
  with pytest.raises(ValueError, match='nothing is adapted'):
    adapters.save_peft(tmp_path, {'w': weights.Frozen(jnp.ones((2, 2)))}, MODEL)
  adapted = trained(QUERIES)
  with pytest.raises(ValueError, match=r'^blocks/attn/k/kernel is a Frozen leaf already'):
    adapters.load_peft(saved(tmp_path), adapted, MODEL)


# The package itself.


def hugging_face(params, folder):
  """The same model in transformers."""
  transformers = pytest.importorskip('transformers')
  from memjax.models import huggingface

  huggingface.save(folder, MODEL, params)
  return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(torch.tensor(np.asarray(TOKENS))).logits.numpy()


def near(x, y):
  """To the 1e-6 of one product, times the eight or so that follow each other in two layers, each of
  which rounds in another order in the two packages.
  """
  np.testing.assert_allclose(x, y, rtol=0, atol=8e-6 * np.abs(y).max())


@pytest.mark.parity
@pytest.mark.parametrize(
  'spec',
  [
    adapters.LoRA(rank=4, alpha=6),
    adapters.LoRA(rank=4, alpha=6, rank_stabilized=True, targets='attn/(q|v)/'),
    adapters.DoRA(rank=4, alpha=6),
  ],
  ids=['lora', 'rslora', 'dora'],
)
def test_peft_computes_what_was_trained_here(spec, params, tmp_path):
  peft = pytest.importorskip('peft')
  ours = trained(spec)
  adapters.save_peft(tmp_path / 'adapter', ours, MODEL)
  model = hugging_face(params, tmp_path / 'model')
  plain = logits_of(model)
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'adapter').eval()
  theirs = logits_of(model)
  near(jax.jit(MODEL.logits)(ours, TOKENS), theirs)
  assert np.abs(theirs - plain).max() > 1e-2


@pytest.mark.parity
@pytest.mark.parametrize('kind', ['use_rslora', 'use_dora'])
def test_what_peft_trained_goes_on_here(kind, params, tmp_path):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  config = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=['q_proj', 'down_proj'], **{kind: True}
  )
  model = peft.get_peft_model(hugging_face(params, tmp_path / 'model'), config).train()
  rng = np.random.default_rng(0)
  named = {name: p for name, p in model.named_parameters() if p.requires_grad}
  with torch.no_grad():
    for p in named.values():
      p.add_(torch.tensor(0.1 * rng.standard_normal(p.shape), dtype=p.dtype))
  model.save_pretrained(tmp_path / 'adapter')
  ours = adapters.load_peft(tmp_path / 'adapter', params, MODEL)
  near(jax.jit(MODEL.logits)(ours, TOKENS), logits_of(model))
  # And learns the same: gradients of one loss.
  loss = model(torch.tensor(np.asarray(TOKENS))).logits.square().mean()
  loss.backward()

  def loss_of(values):
    return jnp.mean(MODEL.logits(weights.replaced(ours, values), TOKENS) ** 2)

  grads = jax.jit(jax.grad(loss_of))(adapters.trainable(ours))['blocks']['attn']['q']['kernel']
  grads = grads.get('adapted', grads)
  module = 'base_model.model.model.layers.1.self_attn.q_proj'
  for part, letter in (('a', 'A'), ('b', 'B')):
    expected = named[f'{module}.lora_{letter}.default.weight'].grad.numpy().T
    near(grads[part][1], expected)


def drawn(*shapes):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_one_matrix_agrees(leaf, layer, factors):
  """Values, and gradients of the sum of their squares by the factors and the activations, to 1e-6
  of the largest.

  Args:
    leaf: Ours.
    layer: Theirs, a module of PyTorch.
    factors: Part of ours -> their parameter.
  """
  torch = pytest.importorskip('torch')
  (x,) = drawn((5, 6))
  given = torch.tensor(x, requires_grad=True)
  y = layer(given)
  y.square().sum().backward()

  def loss(values, x):
    y = weights.dot(x, weights.replaced(leaf, values))
    return jnp.sum(y**2), y

  (grads, of_x), ours = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights.trained(leaf), x)
  grads = {**grads.pop('adapted', {}), **grads}
  expected = {part: p.grad.numpy().T for part, p in factors.items()}
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
  jax.tree.map(close, (ours, of_x, grads), (y.detach().numpy(), given.grad.numpy(), expected))


@pytest.mark.parity
def test_values_and_gradients_are_those_of_loralib():
  loralib, torch = pytest.importorskip('loralib'), pytest.importorskip('torch')
  w, a, b = drawn((6, 8), (6, 3), (3, 8))
  layer = loralib.Linear(6, 8, r=3, lora_alpha=5, bias=False)
  with torch.no_grad():
    for p, value in ((layer.weight, w), (layer.lora_A, a), (layer.lora_B, b)):
      p.copy_(torch.tensor(value.T))
  leaf = weights.Adapted(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), scale=5 / 3)
  assert_one_matrix_agrees(leaf, layer, {'a': layer.lora_A, 'b': layer.lora_B})


@pytest.mark.parity
@pytest.mark.parametrize(
  'spec',
  [
    adapters.LoRA(rank=3, alpha=5),
    adapters.LoRA(rank=3, alpha=5, rank_stabilized=True),
    adapters.DoRA(rank=3, alpha=5),
  ],
  ids=['lora', 'rslora', 'dora'],
)
def test_values_and_gradients_are_those_of_peft(spec):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  w, a, b = drawn((6, 8), (6, 3), (3, 8))
  leaf = adapters.attach({'w': jnp.asarray(w)}, spec, jax.random.key(0))['w']
  kind = dict(use_rslora=spec.rank_stabilized, use_dora=isinstance(spec, adapters.DoRA))
  config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=['0'], **kind)
  model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False)), config)
  layer = model.base_model.model[0]
  factors = {'a': layer.lora_A['default'].weight, 'b': layer.lora_B['default'].weight}
  values = {'a': a, 'b': b}
  if kind['use_dora']:
    factors['magnitude'] = layer.lora_magnitude_vector['default'].weight
    values['magnitude'] = np.linspace(1, 2, 8, dtype=np.float32)
  with torch.no_grad():
    layer.base_layer.weight.copy_(torch.tensor(w.T))
    for part, p in factors.items():
      p.copy_(torch.tensor(values[part].T))
  leaf = adapters.with_factors({'w': leaf}, {'w': values})['w']
  assert_one_matrix_agrees(leaf, layer, factors)
