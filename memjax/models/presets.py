"""Sizes of published models, as fields of `memjax.models.Llama` and the other families."""

from typing import Any

from memjax.models.rotary import RopeScaling


def _galore(hidden, intermediate, heads, layers, vocab=32_000):
  """The family of the low-rank pre-training papers (GaLore, APOLLO, ReLoRA): untied, eps 1e-6."""
  return dict(
    vocab=vocab, hidden=hidden, intermediate=intermediate, heads=heads, layers=layers, norm_eps=1e-6
  )


def _llama2(hidden, intermediate, heads, layers, kv_heads=None):
  """Llama 2 (arXiv 2307.09288)."""
  return dict(
    vocab=32_000,
    hidden=hidden,
    intermediate=intermediate,
    heads=heads,
    kv_heads=kv_heads,
    layers=layers,
    norm_eps=1e-5,
  )


def _llama3(hidden, intermediate, heads, layers, *, stretch=None, tied=False):
  """Llama 3 (arXiv 2407.21783); `stretch` is the rotary scaling of 3.1 (8) and 3.2 (32)."""
  return dict(
    vocab=128_256,
    hidden=hidden,
    intermediate=intermediate,
    heads=heads,
    kv_heads=8,
    layers=layers,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(factor=stretch) if stretch else None,
    tied=tied,
  )


def _opt(hidden, heads, layers, **fields):
  """OPT (arXiv 2205.01068): every size has 2048 positions and an MLP four times as wide."""
  return dict(
    vocab=50_272, hidden=hidden, intermediate=4 * hidden, heads=heads, layers=layers, **fields
  )


def _gpt2(hidden, heads, layers):
  """GPT-2: every size has 1024 positions and an MLP four times as wide."""
  return dict(vocab=50_257, hidden=hidden, intermediate=4 * hidden, heads=heads, layers=layers)


def _qwen(hidden, intermediate, heads, kv_heads, layers, *, vocab=151_936, tied=False, **fields):
  """Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388)."""
  return dict(
    vocab=vocab,
    hidden=hidden,
    intermediate=intermediate,
    heads=heads,
    kv_heads=kv_heads,
    layers=layers,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
    tied=tied,
    **fields,
  )


def _qwen3(*sizes, **fields):
  return _qwen(*sizes, head_dim=128, qk_norm=True, **fields)


def _phi(hidden, heads, layers):
  """Phi-1 to Phi-2 (arXiv 2309.05463): 32 dimensions of a head are rotated."""
  return dict(
    vocab=51_200,
    hidden=hidden,
    intermediate=4 * hidden,
    heads=heads,
    layers=layers,
    rotary_dim=32,
  )


def _bert(hidden, layers, vocab=30_522):
  """BERT (arXiv 1810.04805): heads of width 64, an MLP four times as wide."""
  return dict(
    vocab=vocab, hidden=hidden, intermediate=4 * hidden, heads=hidden // 64, layers=layers
  )


def _roberta(hidden, layers):
  """RoBERTa (arXiv 1907.11692): one type of token, and two unused rows of positions."""
  fields = dict(types=1, offset=2, pad_id=1, norm_eps=1e-5)
  return _bert(hidden, layers, vocab=50_265) | fields


LLAMA: dict[str, dict[str, Any]] = {
  # For a first run on any machine (10.5M parameters), and for tests.
  'llama_quickstart': _galore(256, 688, 4, 8, vocab=8192),
  'llama_tiny': dict(vocab=512, hidden=64, intermediate=176, heads=4, kv_heads=2, layers=2),
  'llama_9m': _galore(128, 352, 4, 4),
  'llama_20m': _galore(256, 688, 4, 4),
  'llama_35m': _galore(384, 1024, 8, 6),
  'llama_40m': _galore(416, 1024, 8, 8),
  'llama_60m': _galore(512, 1376, 8, 8),
  'llama_71m': _galore(512, 1368, 8, 12),
  'llama_100m': _galore(640, 1708, 10, 12, vocab=32_100),
  'llama_130m': _galore(768, 2048, 12, 12),
  'llama_250m': _galore(768, 2560, 16, 24),
  'llama_350m': _galore(1024, 2736, 16, 24),
  'llama_1b': _galore(2048, 5461, 32, 24),
  'llama_3b': _galore(2560, 6848, 32, 32),
  'llama_7b': _galore(4096, 11_008, 32, 32),
  'llama2_7b': _llama2(4096, 11_008, 32, 32),
  'llama2_13b': _llama2(5120, 13_824, 40, 40),
  'llama2_70b': _llama2(8192, 28_672, 64, 80, kv_heads=8),
  'llama3_8b': _llama3(4096, 14_336, 32, 32),
  'llama3_70b': _llama3(8192, 28_672, 64, 80),
  'llama3_1_8b': _llama3(4096, 14_336, 32, 32, stretch=8.0),
  'llama3_1_70b': _llama3(8192, 28_672, 64, 80, stretch=8.0),
  'llama3_2_1b': _llama3(2048, 8192, 32, 16, stretch=32.0, tied=True),
  'llama3_2_3b': _llama3(3072, 8192, 24, 28, stretch=32.0, tied=True),
  'smollm2_135m': dict(
    vocab=49_152,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    layers=30,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    tied=True,
  ),
  # The first release, and Zephyr, which was trained from it.
  'mistral_7b': {**_llama2(4096, 14_336, 32, 32, kv_heads=8), 'window': 4096},
  'qwen2_0_5b': _qwen(896, 4864, 14, 2, 24, tied=True, qkv_bias=True),
  'qwen2_1_5b': _qwen(1536, 8960, 12, 2, 28, tied=True, qkv_bias=True),
  'qwen2_7b': _qwen(3584, 18_944, 28, 4, 28, vocab=152_064, qkv_bias=True),
  'qwen3_0_6b': _qwen3(1024, 3072, 16, 8, 28, tied=True),
  'qwen3_1_7b': _qwen3(2048, 6144, 16, 8, 28, tied=True),
  'qwen3_8b': _qwen3(4096, 12_288, 32, 8, 36),
  # The release for 4,096 tokens.
  'phi3_mini': {**_llama2(3072, 8192, 32, 32), 'vocab': 32_064, 'window': 2047},
}

OPT: dict[str, dict[str, Any]] = {
  'opt_tiny': dict(vocab=512, hidden=64, intermediate=128, heads=4, layers=2, positions=128),
  'opt_125m': _opt(768, 12, 12),
  'opt_350m': _opt(1024, 16, 24, embed_dim=512, pre_norm=False),
  'opt_1_3b': _opt(2048, 32, 24),
  'opt_2_7b': _opt(2560, 32, 32),
  'opt_6_7b': _opt(4096, 32, 32),
  'opt_13b': _opt(5120, 40, 40),
  'opt_30b': _opt(7168, 56, 48),
  'opt_66b': _opt(9216, 72, 64),
  'opt_175b': _opt(12_288, 96, 96),
}

GPT2: dict[str, dict[str, Any]] = {
  'gpt2_tiny': dict(vocab=512, hidden=64, intermediate=128, heads=4, layers=2, positions=128),
  'gpt2': _gpt2(768, 12, 12),
  'gpt2_medium': _gpt2(1024, 16, 24),
  'gpt2_large': _gpt2(1280, 20, 36),
  'gpt2_xl': _gpt2(1600, 25, 48),
}

PHI: dict[str, dict[str, Any]] = {
  'phi_tiny': dict(vocab=512, hidden=64, intermediate=128, heads=4, layers=2, rotary_dim=8),
  'phi_1_5': _phi(2048, 32, 24),
  'phi_2': _phi(2560, 32, 32),
}

BERT: dict[str, dict[str, Any]] = {
  'bert_tiny': dict(vocab=512, hidden=64, intermediate=128, heads=4, layers=2, positions=128),
  'bert_base': _bert(768, 12),
  'bert_large': _bert(1024, 24),
  'roberta_base': _roberta(768, 12),
  'roberta_large': _roberta(1024, 24),
  'minilm_l6': _bert(384, 6) | dict(heads=12, task='embedding', pool='mean'),
}
