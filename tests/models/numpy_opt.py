"""An OPT forward pass in plain numpy and float64, from the formulas and not from the package."""

import math

import numpy as np


def layer_norm(x, p, eps):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p['scale'] + p['bias']


def linear(x, p):
  return x @ p['kernel'] + p['bias']


def attention(x, p, heads):
  """One sequence `[T, D]` without padding."""
  width = x.shape[1] // heads
  q, k, v = (linear(x, p[name]) for name in 'qkv')
  out = np.zeros_like(x)
  for head in range(heads):
    mine = slice(head * width, (head + 1) * width)
    for t in range(len(x)):
      score = np.array([q[t, mine] @ k[s, mine] for s in range(t + 1)]) / math.sqrt(width)
      score = np.exp(score - score.max())
      out[t, mine] = score / score.sum() @ v[: t + 1, mine]
  return linear(out, p['o'])


def mlp(x, p):
  return linear(np.maximum(linear(x, p['up']), 0), p['down'])


def logits(model, params, tokens):
  """Logits `f64[T, V]` of one sequence; `params` are float64 arrays."""
  embed, eps = params['embed'], model.norm_eps
  x = embed['embedding'][tokens]
  if 'project_in' in embed:
    x = x @ embed['project_in']['kernel']
  x = x + embed['positions']['embedding'][2 : 2 + len(tokens)]
  pick = lambda tree, i: {k: pick(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
  for i in range(model.layers):
    p = pick(params['blocks'], i)
    if model.pre_norm:
      x = x + attention(layer_norm(x, p['attn_norm'], eps), p['attn'], model.heads)
      x = x + mlp(layer_norm(x, p['mlp_norm'], eps), p['mlp'])
    else:
      x = layer_norm(x + attention(x, p['attn'], model.heads), p['attn_norm'], eps)
      x = layer_norm(x + mlp(x, p['mlp']), p['mlp_norm'], eps)
  if 'final_norm' in params:
    x = layer_norm(x, params['final_norm'], eps)
  if 'project_out' in params:
    x = x @ params['project_out']['kernel']
  return x @ (params['head']['kernel'] if 'head' in params else embed['embedding'].T)
