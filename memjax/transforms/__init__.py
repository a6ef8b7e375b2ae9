"""Gradient transforms: from a gradient to an update. Each composes with any `optax.chain`."""

from memjax.transforms.adafactor import adafactor as adafactor
from memjax.transforms.adafactor import relative_step as relative_step
from memjax.transforms.adafactor import scale_by_adafactor as scale_by_adafactor
from memjax.transforms.adafactor import scale_by_parameter_rms as scale_by_parameter_rms
from memjax.transforms.adalomo import adalomo as adalomo
from memjax.transforms.adalomo import scale_by_adalomo as scale_by_adalomo
from memjax.transforms.adam_mini import adam_mini as adam_mini
from memjax.transforms.adam_mini import scale_by_adam_mini as scale_by_adam_mini
from memjax.transforms.adam_mini import transformer_blocks as transformer_blocks
from memjax.transforms.bases import Basis as Basis
from memjax.transforms.bases import subspace_iteration as subspace_iteration
from memjax.transforms.bases import svd as svd
from memjax.transforms.came import came as came
from memjax.transforms.came import scale_by_came as scale_by_came
from memjax.transforms.galore import galore as galore
from memjax.transforms.galore import scale_by_galore as scale_by_galore
from memjax.transforms.galore_adafactor import galore_adafactor as galore_adafactor
from memjax.transforms.muon import muon as muon
from memjax.transforms.muon import scale_by_muon as scale_by_muon
from memjax.transforms.project import ProjectState as ProjectState
from memjax.transforms.project import project as project
from memjax.transforms.rounding import apply_updates as apply_updates
from memjax.transforms.sm3 import scale_by_sm3 as scale_by_sm3
from memjax.transforms.sm3 import sm3 as sm3
from memjax.transforms.targets import default_targets as default_targets
