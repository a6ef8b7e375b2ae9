"""Optimizers whose moments live in a low-rank subspace."""

from memjax import transforms
from memjax.optimizers.masks import decays

BASES = {
  'random': transforms.random_projection,
  'subspace_iteration': transforms.subspace_iteration,
  'svd': transforms.svd,
}


def galore(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=0.25,
  side='short',
  basis='subspace_iteration',
  moments='keep',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """GaLore (Zhao et al., 2024); see `memjax.galore`. `targets` is a regex on leaf paths, '' the
  published choice.
  """
  return transforms.galore(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    scale=scale,
    side=side,
    basis=basis_of(basis),
    moments=moments,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def apollo(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=1.0,
  by='channel',
  basis='random',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """APOLLO (Zhu et al., 2024); see `memjax.apollo`. `scale` is the root of the official one."""
  return transforms.apollo(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    by=by,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def apollo_mini(
  learning_rate,
  refresh_every=200,
  scale=128**0.5,
  basis='random',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """APOLLO-Mini (Zhu et al., 2024): rank 1, one factor a matrix; see `memjax.apollo_mini`."""
  return transforms.apollo_mini(
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def fira(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=0.25,
  removed=1.0,
  basis='subspace_iteration',
  moments='keep',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """Fira (Chen et al., 2024); see `memjax.fira`."""
  return transforms.fira(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    removed=removed,
    moments=moments,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def golore(
  learning_rate,
  random_after,
  rank=128,
  refresh_every=200,
  scale=0.25,
  basis='subspace_iteration',
  moments='rotate',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """GoLore (He et al., 2024); see `memjax.golore`. `random_after` counts updates."""
  return transforms.golore(
    learning_rate,
    rank,
    random_after,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    moments=moments,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def q_galore(
  learning_rate,
  rank=128,
  refresh_every=200,
  bits=4,
  threshold=0.4,
  growth=2.0,
  history=5,
  scale=0.25,
  side='short',
  basis='subspace_iteration',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """Q-GaLore (Zhang et al., 2024) with f32 moments and weights as they are; see `memjax.q_galore`.

  `bits` are the bases'; `threshold`, `growth` and `history` govern their refreshes.
  """
  return transforms.q_galore(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    interval=transforms.lazy(threshold, growth, history),
    storage=transforms.packed(bits),
    basis=basis_of(basis),
    scale=scale,
    side=side,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def basis_of(name):
  """Returns how bases are found, by name."""
  if name not in BASES:
    raise ValueError(f'basis {name!r} does not exist; there are {", ".join(BASES)}')
  return BASES[name]()
