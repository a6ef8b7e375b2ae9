r"""OPT 13B fine-tuned in full with MeZO at the memory of inference: 20,000 updates of two forward
passes, 16 sequences each.

    python run.py --config=configs/mezo_opt13b.py \
        --config.data.sources="('jsonl:data/train.jsonl:text',)"

`:smoke` takes seconds on a CPU. Published (arXiv 2305.17333, tables 15, 16 and 22): batch 16,
20,000 steps, constant learning rate 1e-6 or 1e-7, eps 1e-3, no weight decay, 26 GB for one sequence
of 400 tokens. Here the weights are bfloat16, rounded stochastically; the authors' are float16.
"""

from memjax import recipes


def get_config(arg=''):
  return recipes.opt_zeroth_order('13b', arg, step='zeroth_order')
