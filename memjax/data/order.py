"""The order of training examples: a pure function, so a run can resume or re-shard anywhere."""

import functools
import hashlib


def shuffled(position, size, seed):
  """Returns the example read at `position` of an endless shuffled stream over `size` examples.

  Epoch `e` is positions `e * size` to `(e + 1) * size - 1`, and is a permutation of all examples
  that differs from epoch to epoch. The permutation is evaluated at one point in constant time and
  memory (a block cipher on the index).

  Args:
    position: Place in the stream, `step * batch_size + row`; any non-negative int.
    size: Number of examples, at least 1 and below 2**32.
    seed: Any int; different seeds give unrelated orders.

  Returns:
    An int in `[0, size)`.
  """
  return _stream(size, seed)[position]


@functools.lru_cache(maxsize=8)
def _stream(size, seed):
  import grain

  # grain shuffles epoch `e` with `seed + e`, so seed 0 would meet the order of seed 1 an epoch
  # later. Hashing parts them.
  digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
  return grain.MapDataset.range(size).shuffle(seed=int.from_bytes(digest, 'little')).repeat()
