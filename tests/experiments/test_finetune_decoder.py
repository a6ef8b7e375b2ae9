"""The experiment on a tiny decoder: with and without gradients, nothing twice."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from memjax.data.tokenizers import train_bpe
from memjax.models import create, huggingface

PROGRAM = pathlib.Path(__file__).parents[2] / 'experiments/finetune_decoder.py'


@pytest.mark.slow
def test_methods_with_and_without_gradients_stand_in_one_table(tmp_path):
  folder, workdir = tmp_path / 'model', tmp_path / 'results'
  model = create('llama_tiny', vocab=300, hidden=16, intermediate=24, heads=2, kv_heads=1, layers=1)
  huggingface.save(folder, model, model.init(jax.random.key(0)))
  rows = [{'sentence': f'a {["good", "bad"][i % 2]} film', 'label': 1 - i % 2} for i in range(24)]
  (folder / 'tokenizer.json').write_text(train_bpe([r['sentence'] for r in rows] * 9, 300))
  data = tmp_path / 'rows.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))

  def run():
    command = [sys.executable, PROGRAM, f'--model={folder}', f'--train={data}', f'--test={data}']
    command += [
      f'--workdir={workdir}',
      '--methods=lora,mezo',
      '--steps=2',
      '--times=2',
      '--batch=4',
    ]
    command += ['--seq_len=48', '--tested=8', '--evaluations=2']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  out = run()
  assert '| untrained | | 0 | ' in out
  results = json.loads((workdir / 'results.json').read_text())
  assert {name: len(runs) for name, runs in results.items()} == {'lora': 1, 'mezo': 1}
  for name, last in (('lora', 2), ('mezo', 4)):
    (found,) = results[name]
    steps, scores = zip(*found['accuracy'])
    assert steps == (0, last // 2, last)
    assert all(0 <= score <= 1 for score in scores)
    assert 0 < found['peak_gib'] < 1
  assert (workdir / 'results.png').stat().st_size > 1000
  assert 'Memory' not in run()  # Nothing was compiled again.
