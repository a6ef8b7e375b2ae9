"""What a run needs before it runs: bytes by part, and what the compiler says of the compiled
step.
"""

from memjax.plan.memory import check_donated, measure, table

__all__ = ['check_donated', 'measure', 'table']
