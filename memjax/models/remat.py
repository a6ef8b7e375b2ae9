"""What a block keeps from its forward pass, and what the backward pass computes again.

Shapes in this file: `B T` tokens a layer, hidden width `D`, `N` query and `K` key-value heads of
width `H`.
"""

from collections.abc import Callable

import jax

from memjax.naming import nearest

_policies = jax.checkpoint_policies

# Name -> what is saved a layer, besides the block's input `[B, T, D]`.
POLICIES: dict[str, Callable | None] = {
  # Nothing is computed again, everything is saved.
  'none': _policies.everything_saveable,
  # Products with weights are saved: the backward pass repeats norms, activations and attention
  # scores.
  'dots': _policies.dots_with_no_batch_dims_saveable,
  # What enters and leaves the attention, `2 B T H (N + K)` numbers: norms, scores and the MLP are
  # repeated.
  'attention': _policies.save_only_these_names('query', 'key', 'value', 'attention'),
  # Nothing is saved: the block runs twice.
  'full': _policies.nothing_saveable,
}


def check_policy(policy: str) -> None:
  """Raises a `ValueError` naming the nearest policy when `policy` is unknown."""
  if policy not in POLICIES:
    raise ValueError(
      f'no rematerialisation policy is called {policy!r}; {nearest(policy, POLICIES)}'
    )


def rematerialise(block: Callable, policy: str) -> Callable:
  """Returns `block`, saving for its backward pass only what `policy` says, in a `lax.scan` body."""
  check_policy(policy)
  if policy == 'none':
    return block
  # prevent_cse=False: inside a scan the forward and backward loops are apart, so no barrier is
  # needed.
  return jax.checkpoint(block, policy=POLICIES[policy], prevent_cse=False)
