"""Published zeroth-order optimizers: an estimator, and the rule that takes what it hands on.

All are chains that a notebook can write itself; `update(_, state, params, value_fn=loss)`.
"""

import functools
import operator

import jax
import optax

from memjax.estimators import low_rank
from memjax.estimators.estimator import estimator
from memjax.estimators.log import record
from memjax.estimators.noise import family
from memjax.estimators.recomputed import scale_by_recomputed_adam
from memjax.estimators.spsa import dense, forward_gradient, spsa
from memjax.naming import path_string
from memjax.transforms.float32 import in_float32


def chain(
  learning_rate,
  estimate,
  *rule,
  weight_decay: float = 0.0,
  mask=None,
  targets=None,
  log_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Returns an estimator, a rule, decay and the learning rate, with a log if asked for.

  Args:
    learning_rate: A number or a schedule of the count of finished updates.
    estimate: An estimator.
    *rule: Transforms of what it hands on.
    weight_decay: Added to the rule's result times the parameters, before the learning rate.
    mask: Of the leaves that decay, as in `optax.add_decayed_weights`.
    targets: That of the estimator, whose other leaves do not decay either.
    log_steps: Steps that the log has room for, see `memjax.estimators.record`; 0 keeps none.
  """
  mask = mask if targets is None else _mask_of_targets(mask, targets)
  decay = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
  steps = optax.chain(
    estimate,
    in_float32(optax.chain(*rule, *decay, optax.scale_by_learning_rate(learning_rate))),
  )
  return record(steps, learning_rate, log_steps) if log_steps else steps


def mezo(
  learning_rate,
  eps: float = 1e-3,
  *,
  momentum: float | None = None,
  weight_decay: float = 0.0,
  mask=None,
  log_steps: int = 0,
  **options,
) -> optax.GradientTransformationExtraArgs:
  """MeZO: gradient descent on two forward passes, at the memory of one.

  State: a few numbers; with `momentum` the parameters' once, in f32.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> optimizer = mezo(0.05)
    >>> params = jnp.ones(3)
    >>> state = optimizer.init(params)
    >>> loss = lambda params: jnp.sum(params**2)
    >>> updates, state = optimizer.update(None, state, params, value_fn=loss)
    >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
    True

  Args:
    learning_rate: A number or a schedule; the published 1e-6 to 1e-7 for full models.
    eps: As in `spsa`.
    momentum: Share of the running sum of estimates that is kept, undamped; None keeps no sum.
    weight_decay: As in `chain`.
    mask: As in `chain`.
    log_steps: As in `chain`.
    **options: Of `spsa`.

  References:
    Malladi et al., `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, 2023
  """
  rule = [] if momentum is None else [optax.trace(momentum)]
  rest = dict(weight_decay=weight_decay, mask=mask, log_steps=log_steps, **_targets(options))
  return chain(learning_rate, spsa(eps, **options), *rule, **rest)


def mezo_momentum(learning_rate, momentum: float = 0.9, **options):
  """MeZO with heavy-ball momentum; see `mezo`."""
  return mezo(learning_rate, momentum=momentum, **options)


def zo_adam(
  learning_rate,
  eps: float = 1e-3,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  adam_eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask=None,
  log_steps: int = 0,
  **options,
) -> optax.GradientTransformationExtraArgs:
  """Adam on estimates of `spsa`, with both moments kept in f32: `2 d` numbers.

  Args:
    learning_rate: A number or a schedule.
    eps: Of `spsa`.
    b1: Decay of the first moment.
    b2: Decay of the second.
    adam_eps: Added to the root of the second.
    weight_decay: As in `chain`.
    mask: As in `chain`.
    log_steps: As in `chain`.
    **options: Of `spsa`.

  References:
    Zhang et al., `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A
    Benchmark <https://arxiv.org/abs/2402.11592>`_, 2024
  """
  adam = optax.scale_by_adam(b1, b2, adam_eps)
  rest = dict(weight_decay=weight_decay, mask=mask, log_steps=log_steps, **_targets(options))
  return chain(learning_rate, spsa(eps, **options), adam, **rest)


def mezo_adam(learning_rate, eps: float = 1e-3, *, log_steps: int = 0, **options):
  """Adam on MeZO's estimates, without moments: see `scale_by_recomputed_adam` for the options.

  With both moments kept, which is faster and takes `2 d` numbers, it is `zo_adam`.
  """
  return chain(learning_rate, scale_by_recomputed_adam(eps, **options), log_steps=log_steps)


def zo_sgd_sign(learning_rate, eps: float = 1e-3, *, log_steps: int = 0, **options):
  """Descent by the sign of every number of the estimate.

  The published code multiplies the noise by the sign of its slope instead, and hands that to AdamW.
  """
  return chain(learning_rate, spsa(eps, **options), optax.scale_by_sign(), log_steps=log_steps)


def zo_sgd_conservative(
  learning_rate,
  eps: float = 1e-3,
  *,
  noise='gaussian',
  log_steps: int = 0,
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  """Descent that looks before it leaps: of the update, its opposite and none, what is lowest.

  Five forward passes a step. The published code makes both trial steps through AdamW, which does
  not undo them; here they are plain descent.

  Args:
    learning_rate: A number or a schedule.
    eps: As in `spsa`.
    noise: As in `spsa`.
    log_steps: As in `chain`.
    targets: As in `spsa`.
    form: As in `spsa`.
    seed: As in `spsa`.
    stack: As in `spsa`.
  """
  rate = learning_rate if callable(learning_rate) else lambda count: learning_rate
  estimate = estimator(
    dense(family(noise), seed), eps, trial=rate, targets=targets, form=form, stack=stack
  )
  return chain(learning_rate, estimate, log_steps=log_steps)


def forward_descent(learning_rate, *, weight_decay=0.0, mask=None, log_steps=0, **options):
  """Descent by `forward_gradient`."""
  rest = dict(weight_decay=weight_decay, mask=mask, log_steps=log_steps, **_targets(options))
  return chain(learning_rate, forward_gradient(**options), **rest)


def lozo(learning_rate, rank: int = 2, eps: float = 1e-3, *, momentum=None, **options):
  """LOZO, and LOZO-M with `momentum`; see `memjax.estimators.lozo`."""
  rest = _of_chain(options)
  estimate = low_rank.lozo(rank, eps, momentum=momentum, **options)
  return chain(learning_rate, estimate, **rest)


lozo_m = functools.partial(lozo, momentum=0.9)


def subzero(learning_rate, rank: int = 8, eps: float = 1e-3, **options):
  """SubZero; see `memjax.estimators.subzero`."""
  rest = _of_chain(options)
  return chain(learning_rate, low_rank.subzero(rank, eps, **options), **rest)


def _of_chain(options):
  """Takes out of an estimator's options those of the chain."""
  rest = {k: options.pop(k) for k in ('weight_decay', 'mask', 'log_steps') if k in options}
  return rest | _targets(options)


def _targets(options):
  return {'targets': options.get('targets')}


def _mask_of_targets(mask, targets):
  """The leaves of `mask`, or all, that `targets` chooses."""

  def choose(params):
    ours = jax.tree.map_with_path(lambda path, _: bool(targets(path_string(path))), params)
    chosen = mask(params) if callable(mask) else mask
    return ours if chosen is None else jax.tree.map(operator.and_, chosen, ours)

  return choose
