"""What a run needs before it runs: the real compiler's answer, for devices one need not own.

The package is also its main function: `memjax.plan(config, targets=['v5e:1x1', 'rtx4090'])`. From
the command line: `python -m memjax.plan --config=configs/galore_llama7b.py --target=v5e:1x1`.
"""

import sys
import types

from memjax.plan.here import check_fits, compile_here
from memjax.plan.memory import argument_parts, check_donated
from memjax.plan.planning import plan, plan_step
from memjax.plan.receipt import table, verdict

__all__ = [
  'argument_parts',
  'check_donated',
  'check_fits',
  'compile_here',
  'plan',
  'plan_step',
  'table',
  'verdict',
]


class _CallablePackage(types.ModuleType):
  """A module that is called like its function `plan`.

  The package and its one function share a name, as users say it: `memjax.plan(...)`. Python allows
  a module's class to be replaced by a subclass (Data model, "Customizing module attribute access").
  """

  def __call__(self, config, targets, **options):
    return plan(config, targets, **options)


sys.modules[__name__].__class__ = _CallablePackage
