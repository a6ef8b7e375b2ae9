"""Gradients that add up in a subspace, layer by layer against all at once."""

import jax
import optax
import pytest

from memjax import config, plan, transforms
from memjax.steps import layerwise, projected, whole_tree
from tests.models.tiny import assert_trees_close
from tests.steps.test_layerwise_transforms import LAYERS, WIDTH, Toy, batch_of, init_params, train

SHORT = dict(refresh_every=3)
INSIDE = {
  'galore': lambda: transforms.scale_by_galore(4, **SHORT),
  'rotated': lambda: transforms.scale_by_galore(4, moments='rotate', **SHORT),
  'q_galore': lambda: transforms.scale_by_q_galore(4, basis=transforms.svd(), **SHORT),
}


@pytest.mark.parametrize(
  'name', [n if n == 'galore' else pytest.param(n, marks=pytest.mark.slow) for n in INSIDE]
)
def test_layer_by_layer_is_all_at_once(name):
  transform = optax.chain(INSIDE[name](), optax.scale(-0.01))
  ordinary = whole_tree.make_train_step(
    Toy().loss, transform, accumulate=4, accumulate_in='subspace'
  )
  layered = projected.make_train_step(Toy(), transform, accumulate=4)
  ordinary, layered = (train(step, transform) for step in (ordinary, layered))
  assert_trees_close(layered[0]['params'], ordinary[0]['params'], 2e-6)
  assert_trees_close(layered[0]['opt'], ordinary[0]['opt'], 1e-5)
  assert_trees_close(layered[1], ordinary[1], 1e-6)


def test_inputs_of_one_micro_batch_are_kept():
  """Beside those of all eight, which `layerwise` keeps."""
  transform = optax.chain(INSIDE['galore'](), optax.scale(-0.01))
  init = lambda key: whole_tree.init_state(init_params, transform, key)
  state = jax.eval_shape(init, jax.random.key(0))
  rows, length = 64, 256
  batch = batch_of(0, rows, length)

  def temporary(factory):
    step = factory(Toy(), transform, accumulate=8)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    plan.check_donated(compiled, state)
    return compiled.memory_analysis().temp_size_in_bytes

  inputs = LAYERS * rows * length * WIDTH * 4
  saved = temporary(layerwise.make_train_step) - temporary(projected.make_train_step)
  assert saved > 7 / 8 * inputs


def test_a_step_without_sums_of_micro_batches_refuses_where_they_add_up():
  c = config.default()
  c.step, c.accumulate_in = 'hift', 'subspace'
  with pytest.raises(ValueError, match=r"which config\.step='hift' does not read; set"):
    config.validate(c)
