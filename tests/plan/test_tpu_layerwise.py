"""The layer-by-layer step compiled for TPUs that are not here: what it never holds nor moves."""

import jax
import pytest

from memjax import config, plan, weights
from tests.plan.test_tpu import build_for, compile_for, moved_matrices

pytest.importorskip('libtpu')

SPEC = 'configs/adamw_llama60m.py:smoke'


def compile_step(target, step, optimizer=None, **changes):
  return compile_for(
    target,
    SPEC,
    step=step,
    optimizer=optimizer or config.optimizer('sgd', learning_rate=0.1),
    accumulate=1,
    remat='full',
    **changes,
  )[:2]


@pytest.mark.slow
def test_no_gradient_is_larger_than_a_layers():
  """A deeper model takes more temporary memory by its layers' inputs alone."""

  def temporary(layers):
    small = dict(model='llama_9m', batch_size=1, seq_len=64)
    args = dict(loss_chunk=64, layers=layers, vocab=512)
    parts, compiled = compile_step('v5e:1x1', 'layerwise', model_args=args, **small)
    plan.check_donated(compiled, parts.state)
    return compiled.memory_analysis().temp_size_in_bytes, parts

  few, parts = temporary(12)  # Of a smaller model the compiler copies weights to faster memory.
  many, _ = temporary(20)
  hidden = 2 * 64 * 128
  gradient = sum(2 * x.size // 12 for x in jax.tree.leaves(parts.state['params']['blocks']))
  assert gradient > 20 * hidden
  assert many - few <= 8 * hidden


@pytest.mark.slow
def test_layer_by_layer_moves_no_matrix_that_the_ordinary_step_does_not():
  """Eight-way fsdp: a layer's weights are gathered, its gradients reduced to their shards."""
  args = dict(vocab=512, loss_chunk=64)
  small = dict(model='llama_9m', batch_size=16, seq_len=64, model_args=args)
  parts, layered = compile_step('v5e:2x4', 'layerwise', **small)
  _, ordinary = compile_step('v5e:2x4', 'whole_tree', **small)
  moved = moved_matrices(layered, parts)
  assert moved  # The reader sees the gathers of the weights.
  assert moved <= moved_matrices(ordinary, parts)


@pytest.mark.slow
def test_state_on_the_host_was_never_on_the_device():
  """It is made a layer at a time: more layers take no more temporary memory."""

  def temporary(layers):
    small = dict(model='llama_9m', batch_size=2, seq_len=64, model_args=dict(layers=layers))
    changes = dict(optimizer=config.optimizer('adamw', learning_rate=1e-3), offload_state=1.0)
    parts = build_for('v5e:1x1', SPEC, step='layerwise', **changes, **small)
    compiled = parts.init.lower(jax.eval_shape(lambda: jax.random.key(0))).compile()
    return compiled.memory_analysis().temp_size_in_bytes, parts

  few, parts = temporary(4)
  many, _ = temporary(12)
  layer = min(
    4 * x.size // 4 for x in jax.tree.leaves(parts.state['params']['blocks']) if x.ndim > 2
  )
  assert many - few < layer


@pytest.mark.slow
@pytest.mark.parametrize(
  ('spec', 'tokens', 'most'),
  [
    ('lomo_llama7b.py', 2048, 14.3),
    ('adalomo_llama7b.py', 2048, 14.3),
    ('apollo_mini_llama7b.py', 2048, 14.3),
    ('apollo_mini_llama7b.py:weights=int8', 2048, 9.0),
    ('apollo_mini_llama13b_int8.py', 1024, 14.5),
  ],
)
def test_large_models_train_in_full_on_one_v5e(spec, tokens, most):
  """One sequence, bfloat16 or 8 bits rounded stochastically; a chip has 15.75 GiB."""
  large = dict(batch_size=1, accumulate=1, seq_len=tokens)
  parts, compiled, _ = compile_for('v5e:1x1', f'configs/{spec}', **large)
  plan.check_donated(compiled, parts.state)
  memory = compiled.memory_analysis()
  peak = memory.peak_memory_in_bytes / 2**30
  print(f'{spec}: peak {peak:.2f} GiB')
  assert peak <= most
  # All that is no argument is less than the layers' inputs, one layer's gradient, and those of the
  # embedding and the head, all in bfloat16.
  dense = weights.dense(parts.state['params'])
  numbers = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  blocks, (layers, width) = numbers(dense['blocks']), dense['blocks']['attn_norm']['scale'].shape
  most = layers * tokens * width + blocks // layers + numbers(dense) - blocks
  assert memory.temp_size_in_bytes <= 2 * most
