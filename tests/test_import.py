"""What `import memjax` costs, and what the README shows."""

import pathlib
import re
import subprocess
import sys

import jax

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()


def test_import_loads_no_data_library_tokenizer_or_compiler():
  heavy = {'tensorflow', 'grain', 'tokenizers', 'sentencepiece', 'orbax', 'matplotlib', 'libtpu'}
  heavy |= {'safetensors', 'gguf', 'torch', 'transformers'}
  # Beyond what jax itself loads, which looks for a libtpu.
  code = (
    f'import jax, sys; a = set(sys.modules); import memjax; print({heavy} & set(sys.modules) - a)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set()'


def test_the_notebook_examples_of_the_readme_run():
  code, forward, adapters = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  names = {}
  with jax.numpy_rank_promotion('allow'):  # As in a notebook; the tests forbid it.
    exec(code, names)
  assert (names['params']['dense']['kernel'] != 1).any()
  left = [x for x in jax.tree.leaves(names['state']) if x.shape == (512, 64)]
  assert left  # The basis: the projection is really taken.
  before = names['params']['dense']['kernel']
  with jax.numpy_rank_promotion('allow'):
    exec(forward, names)
  assert (names['params']['dense']['kernel'] != before).any()
  with jax.numpy_rank_promotion('allow'):
    exec(adapters, names)
  assert (names['merged']['attn']['kernel'] != names['params']['attn']['kernel']).any()
  assert (names['merged']['scale'] == 1).all()
