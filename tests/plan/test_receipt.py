"""Receipts from made-up reports: what sums to what, and what is said."""

import io

import pytest
from PIL import Image
from rich.console import Console

from memjax.plan import draw, receipt

ARGUMENTS = dict(parameters=100, adapters=0, basis=10, moments=200, other_state=8, batch=4)


def report(**changes):
  """322 bytes of arguments, padded to 340, 10 new outputs, 300 of temporaries, 72 of code."""
  base = dict(
    target='v5e:1x1',
    platform='tpu',
    devices=1,
    fits=True,
    limit_bytes=2000,
    peak_bytes=722,
    host_bytes=0,
    argument_bytes=340,
    parts=ARGUMENTS,
    gradients=100,
    compiled=dict(argument=340, output=330, alias=320, temp=300, generated_code=72, peak=722),
    collectives={'all-gather': 64},
    compile_seconds=1.234,
    cached=False,
    message=None,
    error=None,
  )
  return base | changes


def test_parts_sum_to_the_peak_and_each_is_what_it_says():
  found = receipt.receipt(report())
  assert found['parts'] == ARGUMENTS | {
    'gradients': 100,
    'activations_and_temporaries': 200,
    'new_outputs': 10,
    'generated_code': 72,
    'layout_padding': 18,
    'compiler_reserved': 0,
  }
  assert sum(found['parts'].values()) == found['peak_bytes'] == 722
  assert receipt.state_bytes(found) == 218


def test_what_the_peak_holds_beyond_all_that_is_known_has_a_name():
  found = receipt.receipt(report(peak_bytes=900))
  assert found['parts']['gradients'] + found['parts']['activations_and_temporaries'] == 300
  assert found['parts']['compiler_reserved'] == 900 - 722
  assert sum(found['parts'].values()) == 900


def test_gradients_are_at_most_the_temporaries():
  found = receipt.receipt(report(gradients=10_000))
  assert (found['parts']['gradients'], found['parts']['activations_and_temporaries']) == (300, 0)


def test_temporaries_are_those_alive_at_the_peak_before_any_code():
  found = receipt.receipt(report(peak_bytes=600))
  assert found['parts']['activations_and_temporaries'] == 600 - 340 - 10 - 100
  assert found['parts']['generated_code'] == 0


@pytest.mark.parametrize('peak', [330, 345, 400])
def test_no_part_is_negative_when_the_peak_is_less_than_the_sum(peak):
  found = receipt.receipt(report(peak_bytes=peak))
  assert min(found['parts'].values()) >= 0
  assert sum(found['parts'].values()) == peak
  assert {k: found['parts'][k] for k in ARGUMENTS} == ARGUMENTS  # Never less: they are exact.


def test_a_refused_program_has_arguments_gradients_and_the_rest():
  found = receipt.receipt(report(peak_bytes=5000) | REFUSED)
  assert found['parts']['gradients'] == 100
  assert found['parts']['activations_and_temporaries'] == 5000 - 322 - 100
  assert found['fits'] is False


def test_what_a_refused_program_would_move_is_unknown_and_not_zero():
  refused = receipt.receipt(report(target='v4:1x1x1', peak_bytes=2**30) | REFUSED)
  rows = rows_of(receipt.table([receipt.receipt(report()), refused], 'both'))
  for name in ('all-gather a step', 'generated code', 'outputs beside the state'):
    assert rows[name] == ['0.00', 'unknown']
  assert refused['collectives'] is None
  assert rows_of(receipt.table([refused], 'alone'))['fits'] == ['no']


def test_a_report_of_a_failure_is_its_sentence():
  with pytest.raises(ValueError, match='no such device'):
    receipt.receipt({'target': 'x', 'error': 'no such device', 'fits': None})


# Of a compiler that would not compile it.
REFUSED = dict(fits=False, compiled={}, argument_bytes=None, collectives=None)


def rows_of(table):
  lines = (line.split('│')[1:-1] for line in text(table).split('\n') if '│' in line)
  return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def text(*objects):
  console = Console(file=io.StringIO(), width=100)
  console.print(*objects)
  return console.file.getvalue()


def test_the_table_shows_targets_side_by_side_and_only_parts_that_exist():
  a = receipt.receipt(report())
  b = receipt.receipt(report(target='rtx4090', fits=False, peak_bytes=3 * 2**30, cached=True))
  shown = text(receipt.table([a, b], 'a [title]'))
  rows = rows_of(receipt.table([a, b], 'a [title]'))
  assert 'a [title]' in shown
  assert rows['fits'] == ['yes', 'no']
  assert rows['peak'] == ['0.00', '3.00']
  assert 'GiB' in shown
  assert 'adapters' not in rows
  assert 'all-gather a step' in rows
  assert rows['compile seconds'][1] == '1.2 (cached)'


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    (dict(limit_bytes=2**30, peak_bytes=3 * 2**19), '1x1: fits, 1.50 MiB of 1.00 GiB a device'),
    (dict(fits=False, limit_bytes=2**30, peak_bytes=2**31), 'not fit, 2.00 GiB of 1.00 GiB a'),
    (dict(fits=None, limit_bytes=None, peak_bytes=2**31), 'needs 2.00 GiB .* limit is not known'),
  ],
)
def test_the_verdict(changes, sentence):
  import re

  assert re.search(sentence, receipt.verdict(receipt.receipt(report(**changes))))


def test_pictures_can_be_opened(tmp_path):
  found = [receipt.receipt(report(peak_bytes=2**30 * k)) for k in (1, 2)]
  draw.bars(found, tmp_path / 'bars.png')
  rows = [
    dict(method=f'm{i}', backward='none', precision='bfloat16', fits=bool(i % 2), state_bytes=0)
    | dict(peak_bytes=2**30 * (3 - i), relative_work=1.0 + i, receipt=found[0])
    for i in range(3)
  ]
  draw.trade(rows, tmp_path / 'trade.png')
  for name in ('bars.png', 'trade.png'):
    with Image.open(tmp_path / name) as picture:
      picture.verify()


def test_the_frontier_is_what_no_other_row_beats_in_both():
  rows = [dict(relative_work=w, peak_bytes=p) for w, p in [(1, 9), (2, 5), (2, 6), (3, 5), (4, 1)]]
  assert [(r['relative_work'], r['peak_bytes']) for r in draw.frontier(rows)] == [
    (1, 9),
    (2, 5),
    (4, 1),
  ]


def test_bars_stack_in_the_order_of_the_parts():
  found = receipt.receipt(report())
  last = list(receipt.PARTS)[-1]
  assert draw.sum_before(found, last) + found['parts'][last] == found['peak_bytes']
