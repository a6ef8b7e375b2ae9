"""What `experiments/compare.py` refuses to compare."""

import pytest

from experiments import compare

SMOKE = 'configs/quickstart.py:smoke,method='


def test_methods_are_compared():
  configs = compare.read([f'{SMOKE}adamw', f'{SMOKE}galore'])
  compare.check_alike(configs)
  assert len(configs) == 2


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
