"""The comparison of selections on a tiny model: every run, a table by source, nothing twice."""

import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[2] / 'experiments/colm.py'
SOURCES = [
  'chain_sum',
  'basic_arithmetic',
  'spell_backward',
  'letter_counting',
  'gcd',
  'number_sequence',
  'products',
  'base_conversion',
  'time_intervals',
  'lcm',
]


@pytest.mark.slow
def test_all_selections_train_and_a_finished_run_is_not_repeated(tmp_path):
  # Rows that are there are not drawn again, so reasoning-gym need not be.
  row = lambda i, source: {'instruction': f'{i}?', 'output': str(i), 'source': source}
  for name, count in (('train', 8), ('held_out', 2)):
    rows = [row(i, source) for source in SOURCES for i in range(count)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))

  def run(*extra):
    command = [
      sys.executable,
      PROGRAM,
      f'--workdir={tmp_path}',
      '--steps=2',
      '--pool=8',
      '--rank=2',
    ]
    command += ['--seq_len=64', '--new_tokens=4', *extra]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout

  out = run()
  assert '| source | CoLM | CoLM, one direction | random half | whole pool |' in out
  results = json.loads((tmp_path / 'results.json').read_text())
  assert [r['name'] for r in results] == ['colm', 'official', 'random_half', 'all']
  for r in results:
    assert set(r['loss']) == set(r['exact_match']) == set(SOURCES)
    assert r['train_loss'][-1][0] == 2
  # Other rows were chosen, of the same pools and the same first weights.
  assert len({r['train_loss'][-1][1] for r in results}) == 4
  assert (tmp_path / 'results.png').stat().st_size > 1000
  assert 'Memory' not in run()  # Nothing was compiled again.
