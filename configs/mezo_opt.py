r"""OPT fine-tuned with MeZO on a task of its paper: published prompts, draws and hyperparameters.

    python run.py --config=configs/mezo_opt.py:size=13b,task=sst2,model=FOLDER

`model` is a Hugging Face folder; without it the weights are random, for a look at the memory.
`train=` and `test=` name files; without them the prepared TensorFlow dataset is read.
`adapter=lora` trains adapters of queries and values; `method=` is another zeroth-order method.
`:smoke` takes seconds on a CPU, on made-up rows.

Published (arXiv 2305.17333, tables 1, 15, 16): 1,000 training, 500 development and 1,000 test
examples drawn with seed 0 (CB, COPA: 100 to develop on), batch 16, 20,000 steps, evaluation every
4,000, constant learning rate 1e-6 or 1e-7 (adapters: 1e-4 or 5e-5), eps 1e-3 (1e-2); the loss is
over options, and over tokens for COPA, ReCoRD, SQuAD and DROP. OPT-13B: SST-2 91.4, RTE 66.1, CB
67.9, BoolQ 67.6, WSC 63.5, WIC 61.1, MultiRC 60.1, COPA 88.0, ReCoRD 81.7, SQuAD 84.7, DROP 30.9.
"""

from memjax.config import parse_arg
from memjax.tasks import recipes


def get_config(arg=''):
  arg = parse_arg(
    arg,
    smoke=False,
    size='13b',
    task='sst2',
    model='',
    method='mezo',
    adapter='none',
    learning_rate=0.0,
    train='',
    test='',
  )
  return recipes.mezo_opt(arg)
