"""What `experiments/compare.py` refuses to compare."""

import pytest

from experiments import compare
from memjax import optimizers

SMOKE = 'configs/quickstart.py:smoke,method='


def test_methods_are_compared():
  configs = compare.read([f'{SMOKE}adamw', f'{SMOKE}galore'])
  compare.check_alike(configs)
  assert len(configs) == 2


def test_all_methods_of_the_quick_start_are_alike_but_for_the_method():
  configs = compare.read(compare.quickstart_specs(['all']))
  compare.check_alike(configs)
  names = {config.optimizer.name for config in configs.values()}
  assert names == optimizers.OPTIMIZERS.keys() - {'sgd'}


def test_two_runs_of_one_name_are_refused():
  with pytest.raises(ValueError, match=r'two configs would both run as .*adamw'):
    compare.read([f'{SMOKE}adamw', f'{SMOKE}adamw'])


@pytest.mark.parametrize(
  ('field', 'value'),
  [('model', 'llama_9m'), ('load', 'FOLDER'), ('model_args.layers', 3), ('steps', 5)],
)
def test_runs_that_differ_in_more_than_the_method_are_refused(field, value):
  configs = compare.read([f'{SMOKE}adamw', f'{SMOKE}galore'])
  list(configs.values())[1].update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f'differ in {field.partition(".")[0]}; give them the same'):
    compare.check_alike(configs)
