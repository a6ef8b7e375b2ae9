"""The child process of a plan: `python -m memjax.plan.worker`.

It reads one job as JSON on its standard input and writes one report as JSON on its standard output;
what compilers print goes to its standard error. It is a process of its own because the user's JAX
keeps its platform, because a compiler that crashes or runs out of memory takes only this process
along, and because a loaded compiler cannot be unloaded.
"""

import json
import os
import sys

import jax

from memjax.plan.compiler import ENVIRONMENT
from memjax.plan.program import report


def main() -> None:
  """Reads a job, writes its report."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Compilers print on what they think is standard output.
  os.environ.update(ENVIRONMENT)  # For who starts this by hand.
  jax.config.update('jax_platforms', 'cpu')
  json.dump(report(json.load(sys.stdin)), out)
  out.close()


if __name__ == '__main__':
  main()
