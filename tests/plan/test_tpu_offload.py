"""Optimizer state in the host's memory, in programs compiled for a TPU that is not here."""

import re

import jax
import pytest

from tests.plan.test_tpu import compile_for

pytest.importorskip('libtpu')
pytestmark = pytest.mark.slow


def compile_step(step, layers, **changes):
  return compile_for(
    'v5e:1x1',
    'configs/adamw_llama60m.py:smoke',
    step=step,
    model='llama_9m',
    model_args=dict(loss_chunk=64, layers=layers, vocab=512),
    batch_size=1,
    accumulate=1,
    seq_len=64,
    remat='full',
    **changes,
  )[:2]


def test_state_travels_while_a_layer_is_differentiated():
  """Half of it. In the loop over layers all fetches begin before the block runs again and are
  awaited where they are used; results leave while the rest of the layer is updated.
  """
  _, compiled = compile_step('layerwise', 4, offload_state=0.5)
  text = compiled.as_text()
  fetches, stores = computed_meanwhile(text, 'slice'), computed_meanwhile(text, 'update-slice')
  assert len(fetches) == len(stores) > 4  # Both moments of some leaves.
  assert min(fetches) > 10
  assert min(stores) > 5


def computed_meanwhile(text, kind):
  """Of each `dynamic-KIND` of host memory that is started, the fusions before it is awaited."""
  lines = text.splitlines()
  starts = re.compile(rf'(%dynamic-{kind}-start\S*) = .*S\(5\).* dynamic-{kind}-start\(')
  found = []
  for begin, line in enumerate(lines):
    if match := starts.search(line):
      awaited = f'dynamic-{kind}-done({match[1]})'
      end = next(i for i in range(begin, len(lines)) if awaited in lines[i])
      found.append(sum(' fusion(' in between for between in lines[begin:end]))
  return found


def test_only_the_group_whose_turn_it_is_has_gradients_and_state_on_the_device():
  """HiFT: two more layers bring their weights to the device, their inputs, and nothing else."""
  (_, few), (parts, many) = (compile_step('hift', layers) for layers in (2, 4))
  few, many = few.memory_analysis(), many.memory_analysis()
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  params, opt = parts.state['params'], parts.state['opt']
  two = size(params['blocks']) // 2  # In bfloat16, which is also the size of their gradients.
  assert many.argument_size_in_bytes - few.argument_size_in_bytes < 1.05 * two
  assert many.host_argument_size_in_bytes > 0.95 * size(opt)
  assert many.temp_size_in_bytes - few.temp_size_in_bytes < two / 4
