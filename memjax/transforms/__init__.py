"""Gradient transforms: from a gradient to an update. Each composes with any `optax.chain`."""

from memjax.transforms.bases import Basis as Basis
from memjax.transforms.bases import subspace_iteration as subspace_iteration
from memjax.transforms.bases import svd as svd
from memjax.transforms.galore import galore as galore
from memjax.transforms.galore import scale_by_galore as scale_by_galore
from memjax.transforms.project import ProjectState as ProjectState
from memjax.transforms.project import project as project
from memjax.transforms.rounding import apply_updates as apply_updates
from memjax.transforms.targets import default_targets as default_targets
