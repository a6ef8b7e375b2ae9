"""Pictures of receipts and of recommendations."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax.plan.receipt import GIB, PARTS

# Cold colours for what training keeps, warm ones for what comes and goes within a step.
_COLOURS = {
  'parameters': '#1f4e79',
  'adapters': '#17806d',
  'gradients': '#c0392b',
  'basis': '#3fa7d6',
  'moments': '#5b7db1',
  'other_state': '#9db4d0',
  'batch': '#7f8c8d',
  'activations_and_temporaries': '#e67e22',
  'new_outputs': '#b7950b',
  'generated_code': '#8e6bbf',
  'layout_padding': '#d5cfc4',
  'compiler_reserved': '#b0a999',
}
_MARKERS = 'osD^vPX*'


def check_file(file) -> None:
  """Raises a `ValueError` for a name whose ending is no kind of picture."""
  kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
  if pathlib.Path(file).suffix[1:].lower() not in kinds:
    raise ValueError(f'{file}: pictures end in one of .' + ', .'.join(kinds))


def bars(receipts: list[dict], file) -> None:
  """Draws a stacked bar a receipt, with the device's limit as a line across it if it is near."""
  figure, axes = _figure(2.2 + 1.2 * max(3, len(receipts)))
  for part, words in PARTS.items():
    sizes = [found['parts'][part] / GIB for found in receipts]
    if any(sizes):
      bottom = [sum_before(found, part) / GIB for found in receipts]
      axes.bar(range(len(receipts)), sizes, 0.6, bottom, label=words, color=_COLOURS[part])
  for i, found in enumerate(receipts):
    if _in_sight(found['limit_bytes'], receipts):
      label = 'limit' if i == 0 else None
      y = found['limit_bytes'] / GIB
      axes.plot([i - 0.4, i + 0.4], [y, y], color='black', linewidth=2, label=label)
    axes.annotate(
      f'{found["peak_bytes"] / GIB:.2f}', (i, found['peak_bytes'] / GIB), ha='center', va='bottom'
    )
  axes.set_xticks(range(len(receipts)), [found['target'] for found in receipts])
  axes.set_ylabel('GiB of one device')
  axes.legend(loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False, reverse=True)
  figure.savefig(file, dpi=150)


def sum_before(found: dict, part: str) -> int:
  """Returns the bytes of the parts that are stacked below one."""
  names = list(PARTS)
  return sum(found['parts'][name] for name in names[: names.index(part)])


def trade(rows: list[dict], file) -> None:
  """Draws peak memory over relative work, a point a row of `memjax.plan.recommend.recommend`.

  Named are the rows that no other beats in both.
  """
  figure, axes = _figure(8)
  ways = list(dict.fromkeys(row['backward'] for row in rows))
  colours = {'float32': '#1f4e79', 'mixed': '#17806d', 'bfloat16': '#e67e22'}
  for row in rows:
    axes.scatter(
      row['relative_work'],
      row['peak_bytes'] / GIB,
      marker=_MARKERS[ways.index(row['backward'])],
      color=colours.get(row['precision'], '#7f8c8d'),
      alpha=1.0 if row['fits'] else 0.35,
    )
  for row in frontier(rows):
    point = (row['relative_work'], row['peak_bytes'] / GIB)
    axes.annotate(row['method'], point, xytext=(5, 4), textcoords='offset points', fontsize=8)
  limit = rows[0]['receipt']['limit_bytes']
  if _in_sight(limit, rows):
    axes.axhline(limit / GIB, color='black', linewidth=1, label='limit')
  for i, way in enumerate(ways):
    axes.scatter([], [], marker=_MARKERS[i], color='grey', label=way)
  for precision in dict.fromkeys(row['precision'] for row in rows):
    axes.scatter([], [], marker='s', color=colours.get(precision, '#7f8c8d'), label=precision)
  axes.set_xlabel('operations, relative to AdamW without rematerialisation')
  axes.set_ylabel('peak GiB of one device')
  axes.set_ylim(bottom=0)
  axes.legend(loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False)
  figure.savefig(file, dpi=150)


def frontier(rows: list[dict]) -> list[dict]:
  """Returns the rows that no other beats in both peak and work."""
  key = lambda row: (row['relative_work'], row['peak_bytes'])
  return [
    row
    for row in rows
    if not any(
      other is not row
      and all(a <= b for a, b in zip(key(other), key(row)))
      and key(other) != key(row)
      for other in rows
    )
  ]


def _in_sight(limit, drawn) -> bool:
  """Whether a line at the limit leaves what is drawn large enough to be seen."""
  return limit is not None and limit <= 8 * max(one['peak_bytes'] for one in drawn)


def _figure(width):
  figure = Figure(figsize=(width, 4.8), layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots()
