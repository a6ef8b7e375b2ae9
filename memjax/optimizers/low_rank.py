"""Optimizers whose moments live in a low-rank subspace."""

from memjax import transforms
from memjax.optimizers.masks import decays

BASES = {'subspace_iteration': transforms.subspace_iteration, 'svd': transforms.svd}


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
  if basis not in BASES:
    raise ValueError(f'basis {basis!r} does not exist; there are {", ".join(BASES)}')
  return transforms.galore(
    learning_rate,
    rank,
    b1=b1,
    b2=b2,
    eps=eps,
    refresh_every=refresh_every,
    scale=scale,
    side=side,
    basis=BASES[basis](),
    moments=moments,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )
