"""Optimizers that keep whole first moments, or none."""

import optax

from memjax import transforms
from memjax.optimizers.masks import decays
from memjax.transforms.float32 import in_float32


def adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, state_dtype='float32'):
  """Adam with decoupled weight decay on matrices (Loshchilov and Hutter, 2019).

  `state_dtype='bfloat16'` halves its state, rounded stochastically; see `memjax.round_state`.
  """
  if state_dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"state_dtype must be 'float32' or 'bfloat16', got {state_dtype!r}")
  moments = optax.scale_by_adam(b1, b2, eps)
  steps = optax.chain(
    moments if state_dtype == 'float32' else transforms.round_state(moments),
    optax.add_decayed_weights(weight_decay, decays),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def adam_mini(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, *, head_dim=1):
  """Adam-mini (Zhang et al., 2024); see `memjax.adam_mini`.

  `head_dim` is the width of the model's attention heads, which as published share a second moment
  in queries and keys; 1 gives every output neuron its own there, as in the other matrices.
  """
  return transforms.adam_mini(
    learning_rate, b1, b2, eps=eps, head_dim=head_dim, weight_decay=weight_decay, mask=decays
  )


def lion(learning_rate, b1=0.9, b2=0.99, mu_dtype='float32', weight_decay=0.0):
  """Lion (Chen et al., 2023) as optax has it. `mu_dtype='bfloat16'` halves its state."""
  return in_float32(
    optax.lion(learning_rate, b1, b2, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=decays)
  )


def muon(
  learning_rate,
  adam_scale=1.0,
  b1=0.95,
  newton_schulz_steps=5,
  adam_b1=0.9,
  adam_b2=0.999,
  weight_decay=0.0,
  targets='',
):
  """Muon on the layers' matrices and Adam elsewhere (Jordan et al., 2024); see `memjax.muon`.

  Adam's learning rate is `adam_scale` of Muon's; `targets` is a regex on leaf paths, '' the layers.
  """
  if callable(learning_rate):
    adam_learning_rate = lambda count: adam_scale * learning_rate(count)
  else:
    adam_learning_rate = adam_scale * learning_rate
  return transforms.muon(
    learning_rate,
    b1,
    newton_schulz_steps=newton_schulz_steps,
    targets=targets or None,
    adam_learning_rate=adam_learning_rate,
    adam_b1=adam_b1,
    adam_b2=adam_b2,
    weight_decay=weight_decay,
    mask=decays,
  )


def vector_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, hold=True, weight_decay=0.0, eta=0.0):
  """Adam with a count of updates for each vector of a low-rank factor; see `memjax.vector_adam`."""
  return transforms.vector_adam(
    learning_rate, b1, b2, eps, hold=hold, weight_decay=weight_decay, mask=decays, eta=eta
  )


def sgd(learning_rate, momentum=0.0):
  """Gradient descent, with momentum if it is above zero."""
  return in_float32(optax.sgd(learning_rate, momentum=momentum or None))
