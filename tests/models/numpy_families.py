"""GPT-2's, Phi's and BERT's forward passes in plain numpy and float64, from the formulas and not
from the package. One sequence at a time, without padding.
"""

import math

import numpy as np
from numpy_opt import layer_norm, linear


def gelu(x):
  return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, p, activation):
  return linear(activation(linear(x, p['up'])), p['down'])


def rotate(vector, position, dim, theta):
  """Turns dimension `i` with `i + dim / 2`, for `i < dim / 2`, and leaves those from `dim` on."""
  out, half = vector.copy(), dim // 2
  for i in range(half):
    angle = position * theta ** (-2 * i / dim)
    a, b = vector[i], vector[i + half]
    out[i] = a * math.cos(angle) - b * math.sin(angle)
    out[i + half] = b * math.cos(angle) + a * math.sin(angle)
  return out


def attention(x, p, heads, kv_heads, causal, rotary=lambda vector, position: vector):
  width = p['q']['kernel'].shape[1] // heads
  q, k, v = (linear(x, p[name]) for name in 'qkv')
  out = np.zeros_like(q)
  for head in range(heads):
    own = slice(head * width, (head + 1) * width)
    group = head // (heads // kv_heads)
    shared = slice(group * width, (group + 1) * width)
    keys = np.stack([rotary(k[s, shared], s) for s in range(len(x))])
    for t in range(len(x)):
      seen = t + 1 if causal else len(x)
      score = keys[:seen] @ rotary(q[t, own], t) / math.sqrt(width)
      score = np.exp(score - score.max())
      out[t, own] = score / score.sum() @ v[:seen, shared]
  return linear(out, p['o'])


def layers(params, count):
  pick = lambda tree, i: {k: pick(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
  return [pick(params['blocks'], i) for i in range(count)]


def gpt2_logits(model, params, tokens):
  embed, eps = params['embed'], model.norm_eps
  x = embed['embedding'][tokens] + embed['positions']['embedding'][: len(tokens)]
  for p in layers(params, model.layers):
    y = layer_norm(x, p['attn_norm'], eps)
    x = x + attention(y, p['attn'], model.heads, model.heads, causal=True)
    x = x + mlp(layer_norm(x, p['mlp_norm'], eps), p['mlp'], gelu_tanh)
  return layer_norm(x, params['final_norm'], eps) @ embed['embedding'].T


def phi_logits(model, params, tokens):
  x = params['embed']['embedding'][tokens]
  rotary = lambda vector, position: rotate(vector, position, model.rotary_dim, model.rope_theta)
  for p in layers(params, model.layers):
    y = layer_norm(x, p['norm'], model.norm_eps)
    read = attention(y, p['attn'], model.heads, model.kv_heads, causal=True, rotary=rotary)
    x = x + read + mlp(y, p['mlp'], gelu_tanh)
  return linear(layer_norm(x, params['final_norm'], model.norm_eps), params['head'])


def bert_hidden(model, params, tokens, types):
  embed, eps = params['embed'], model.norm_eps
  x = embed['embedding'][tokens] + embed['types']['embedding'][types]
  x = x + embed['positions']['embedding'][model.offset : model.offset + len(tokens)]
  x = layer_norm(x, embed['norm'], eps)
  for p in layers(params, model.layers):
    x = layer_norm(
      x + attention(x, p['attn'], model.heads, model.heads, False), p['attn_norm'], eps
    )
    x = layer_norm(x + mlp(x, p['mlp'], gelu), p['mlp_norm'], eps)
  return x


def bert_logits(model, params, tokens, types):
  x = bert_hidden(model, params, tokens, types)
  if model.task == 'embedding':
    x = x.mean(0) if model.pool == 'mean' else x[0]
    return x / np.linalg.norm(x)
  if model.task != 'span':
    head = params['head']
    x = x.mean(0) if model.pool == 'mean' else np.tanh(linear(x[0], head['dense']))
  y = linear(x, params['head']['out'])
  return y[0] if model.task == 'regression' else y
