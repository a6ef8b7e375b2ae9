r"""An encoder fine-tuned on a GLUE task with any method, by default GaLore of rank 4.

    python run.py --config=configs/glue.py:task=mrpc,method=galore,model=FOLDER

`model` is a Hugging Face folder, such as RoBERTa-base's, or a preset; a decoder is used by prompt.
`train=` and `test=` name files (.tsv or .jsonl); without them the prepared TensorFlow dataset is
read. `method` is an optimizer, an adapter (`lora`) or a zeroth-order method. `:smoke` takes seconds
on a CPU, on made-up rows.

Published (GaLore, arXiv 2403.03507, tables 4 and 7): 30 epochs of 16 (CoLA: 32) rows of at most
512 tokens; rank 4 with scale 4, learning rate 1e-5 (MRPC, CoLA: 3e-5); rank 8 with scale 2.
RoBERTa-base, GaLore r 4 / LoRA r 4 / full: CoLA 60.35 / 61.38 / 62.24, STS-B 90.73 / 90.57 / 90.92,
MRPC 92.25 / 91.07 / 91.30 (F1), RTE 79.42 / 78.70 / 79.42, SST-2 94.04 / 92.89 / 94.57.
"""

from memjax.config import parse_arg
from memjax.tasks import recipes


def get_config(arg=''):
  arg = parse_arg(
    arg,
    smoke=False,
    task='sst2',
    method='galore',
    model='',
    rank=4,
    learning_rate=0.0,
    train='',
    dev='',
    test='',
    steps=0,
    seq_len=512,
  )
  recipes.known_glue(arg.task)
  return recipes.glue(arg)
