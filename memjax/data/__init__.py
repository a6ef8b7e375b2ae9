"""Text, from a source on disk to the global batch of any training step.

Importing this loads numpy and nothing heavier; grain and the tokenizers are imported when used.

>>> import tempfile
>>> from memjax import data
>>> cache = tempfile.TemporaryDirectory()
>>> dataset = data.load(
...   ['stdlib'], 'bytes', seq_len=64, vocab_size=512, cache_dir=cache.name, max_tokens=200_000
... )
>>> batch = dataset.train.rows(step=7, batch_size=16, start=0, stop=4, seed=0)  # 4 rows of 16.
>>> {name: (value.shape, str(value.dtype)) for name, value in batch.items()}
{'tokens': ((4, 64), 'int32'), 'targets': ((4, 64), 'int32'), 'weights': ((4, 64), 'float32')}
>>> bool((batch['tokens'][:, 1:] == batch['targets'][:, :-1]).all())
True
"""

from memjax.data.dataset import Dataset, load
from memjax.data.packing import Split

__all__ = ['Dataset', 'Split', 'load']
