r"""OPT 66B fine-tuned in full with MeZO, its blocks streamed from host memory (ZO2): one device of
6.5 GiB and 122 GiB of host memory. 20,000 updates of two forward passes, 16 sequences each.

    python run.py --config=configs/zo2_opt66b.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. Hyperparameters are MeZO's for OPT (arXiv 2305.17333, tables 15 and
16); the published package (arXiv 2503.12668) needs 12.1 GB of device memory at 1 x 2048 tokens.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.opt_zeroth_order('66b', arg, step='streamed')
