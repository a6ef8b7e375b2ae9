"""The experiment on a tiny encoder: learns words, resumes, and says what it kept."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from memjax.models import create, huggingface

PROGRAM = pathlib.Path(__file__).parents[2] / 'experiments/finetune_encoder.py'
WORDS = ['[PAD]', '[UNK]', 'good', 'bad', 'the', 'film', 'is', 'a', 'plot']


@pytest.mark.slow
def test_a_tiny_encoder_learns_and_a_finished_run_is_not_repeated(tmp_path):
  folder, workdir = tmp_path / 'model', tmp_path / 'results'
  model = create(
    'bert_tiny', vocab=len(WORDS), hidden=16, intermediate=32, task='embedding', pool='mean'
  )
  huggingface.save(folder, model, model.init(jax.random.key(0)))
  tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  words = {0: 'bad', 1: 'good'}
  rows = [{'text': f'the {"film " * (i % 5)} is {words[i % 2]}', 'label': i % 2} for i in range(90)]
  data = tmp_path / 'rows.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))

  def run(*extra):
    command = [sys.executable, PROGRAM, f'--model={folder}', f'--train={data}', f'--dev={data}']
    command += [f'--workdir={workdir}', '--seeds=2', '--methods=adamw,lora_r4', '--rates=0.02']
    command += ['--epochs=8', '--references=half=0.5', *extra]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

  out = run()
  assert '| half | 0.500 |' in out
  results = json.loads((workdir / 'results.json').read_text())
  assert [(r['name'], r['seed']) for r in results] == [
    (name, seed) for seed in (0, 1) for name in ('adamw-0.02', 'lora_r4-0.02')
  ]
  assert min(r['accuracy'] for r in results) == 1.0
  full, lora = results[:2]
  params = 4 * model.num_params()
  head = 4 * (16 * 2 + 2)
  assert full['trained_bytes'] == params + head
  assert full['state_bytes'] >= 2 * full['trained_bytes']
  # Factors [m, 4] and [4, n] of four matrices [16, 16] and two [16, 32], in each of two layers.
  assert lora['trained_bytes'] == head + 4 * 2 * 4 * (4 * 32 + 2 * 48)
  assert (workdir / 'results.png').stat().st_size > 1000
  assert 'step' not in run().replace('step s', '')  # Nothing was trained again.
