"""Optimizers of the zeroth-order step: forward passes in place of a gradient.

Arguments they share: `eps`, the distance of two values; `samples`, directions a step; `seed`, of
the noise; `log_steps`, steps that the log has room for (see `memjax.replay`), 0 keeps none.
"""

from memjax.estimators import methods
from memjax.estimators.noise import family
from memjax.optimizers.masks import decays


def mezo(
  learning_rate,
  eps=1e-3,
  samples=1,
  sides=2,
  noise='gaussian',
  density=1.0,
  resample_every=1,
  blockwise=False,
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """Descent on two values (Malladi et al., 2023); see `memjax.mezo` and `memjax.estimators.spsa`.

  `density` below 1 perturbs that share of the numbers, others every `resample_every` steps.
  """
  return methods.mezo(
    learning_rate,
    **_options(eps, samples, sides, noise, density, resample_every, seed),
    **_rest(weight_decay, log_steps),
    blockwise=blockwise,
  )


def mezo_momentum(
  learning_rate,
  momentum=0.9,
  eps=1e-3,
  samples=1,
  sides=2,
  noise='gaussian',
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """MeZO with heavy-ball momentum, which takes the parameters' size in f32."""
  return methods.mezo(
    learning_rate,
    momentum=momentum,
    **_options(eps, samples, sides, noise, 1.0, 1, seed),
    **_rest(weight_decay, log_steps),
  )


def zo_adam(
  learning_rate,
  eps=1e-3,
  samples=1,
  sides=2,
  noise='gaussian',
  b1=0.9,
  b2=0.999,
  adam_eps=1e-8,
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """Adam on what MeZO hands on, with both moments kept (Zhang et al., 2024)."""
  return methods.zo_adam(
    learning_rate,
    b1=b1,
    b2=b2,
    adam_eps=adam_eps,
    **_options(eps, samples, sides, noise, 1.0, 1, seed),
    **_rest(weight_decay, log_steps),
  )


def mezo_adam(
  learning_rate,
  window=256,
  eps=1e-3,
  samples=1,
  b1=0.9,
  b2=0.999,
  adam_eps=1e-8,
  noise='gaussian',
  log_steps=0,
  seed=0,
):
  """Adam on what MeZO hands on, its moments computed anew from the last `window` slopes."""
  return methods.mezo_adam(
    learning_rate,
    window=window,
    b1=b1,
    b2=b2,
    adam_eps=adam_eps,
    log_steps=log_steps,
    **_options(eps, samples, 2, noise, 1.0, 1, seed),
  )


def zo_sgd_sign(learning_rate, eps=1e-3, samples=1, sides=2, noise='gaussian', log_steps=0, seed=0):
  """Descent by the signs of what MeZO hands on."""
  options = _options(eps, samples, sides, noise, 1.0, 1, seed)
  return methods.zo_sgd_sign(learning_rate, log_steps=log_steps, **options)


def zo_sgd_conservative(learning_rate, eps=1e-3, noise='gaussian', log_steps=0, seed=0):
  """Descent that takes the better of an update, its opposite and none; five forward passes."""
  return methods.zo_sgd_conservative(
    learning_rate, eps, noise=noise, log_steps=log_steps, form='weights', seed=seed
  )


def forward_gradient(
  learning_rate, samples=1, noise='gaussian', weight_decay=0.0, log_steps=0, seed=0
):
  """Descent along random directions by the exact derivative, in forward mode."""
  return methods.forward_descent(
    learning_rate,
    samples=samples,
    noise=noise,
    form='weights',
    seed=seed,
    **_rest(weight_decay, log_steps),
  )


def lozo(
  learning_rate,
  rank=2,
  eps=1e-3,
  refresh_every=50,
  scale='paper',
  samples=1,
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """Descent along noise of low rank, half of which is kept for a while (Chen et al., 2024)."""
  return methods.lozo(
    learning_rate,
    rank,
    eps,
    refresh_every=refresh_every,
    scale=scale,
    samples=samples,
    form='weights',
    seed=seed,
    **_rest(weight_decay, log_steps),
  )


def lozo_m(
  learning_rate,
  rank=2,
  momentum=0.9,
  eps=1e-3,
  refresh_every=50,
  scale='paper',
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """LOZO with momentum, `rank` numbers for every row of a matrix."""
  return methods.lozo(
    learning_rate,
    rank,
    eps,
    momentum=momentum,
    refresh_every=refresh_every,
    scale=scale,
    form='weights',
    seed=seed,
    **_rest(weight_decay, log_steps),
  )


def subzero(
  learning_rate,
  rank=8,
  eps=1e-3,
  refresh_every=1000,
  reshape=False,
  samples=1,
  weight_decay=0.0,
  log_steps=0,
  seed=0,
):
  """Descent in random subspaces with orthonormal sides (Yu et al., 2024).

  `reshape` sees each matrix as the most nearly square one with as many numbers: for the long
  factors of adapters.
  """
  return methods.subzero(
    learning_rate,
    rank,
    eps,
    refresh_every=refresh_every,
    reshape=reshape,
    samples=samples,
    form='weights',
    seed=seed,
    **_rest(weight_decay, log_steps),
  )


def _options(eps, samples, sides, noise, density, resample_every, seed):
  noise = family(noise, density, resample_every)
  return dict(eps=eps, samples=samples, sides=sides, noise=noise, seed=seed, form='weights')


def _rest(weight_decay, log_steps):
  return dict(weight_decay=weight_decay, mask=decays, log_steps=log_steps)
