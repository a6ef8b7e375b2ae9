r"""A decoder tuned on instructions with sources, by default through LoRA.

    python run.py --config=configs/instruct.py:train=math_instruct.jsonl,model=FOLDER

`train` is a .jsonl or .json file of rows with `instruction`, `output` and, where they come from
several places, `source`, as MathInstruct has them; 500 are kept to develop on, unless `test=` names
a file. `method` is an adapter or an optimizer. `:smoke` takes seconds on a CPU, on made-up rows.

Published for MathInstruct (CoLM, arXiv 2407.19580): rank 128, alpha 512, learning rate 2e-5 with
3 % warm-up, then linear; at most 512 tokens; 1,024 updates of 64.
"""

from memjax.config import parse_arg
from memjax.tasks import recipes


def get_config(arg=''):
  arg = parse_arg(
    arg, smoke=False, model='', method='lora', rank=128, learning_rate=0.0, train='', test=''
  )
  return recipes.instruct(arg)
