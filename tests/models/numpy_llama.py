"""A LLaMA forward pass in plain numpy and float64, from the formulas and not from the package."""

import math

import numpy as np


def rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def wavelength_scaled(frequency, factor, low, high, original):
  """Llama 3.1: long wavelengths are slowed, short ones kept, those between blended."""
  wavelength = 2 * math.pi / frequency
  if wavelength < original / high:
    return frequency
  if wavelength > original / low:
    return frequency / factor
  smooth = (original / wavelength - low) / (high - low)
  return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x, position, theta, scaling):
  """Rotates one head's vector `x[H]` as complex numbers `x[i] + j x[i + H/2]`."""
  half = len(x) // 2
  frequency = [theta ** (-2 * i / len(x)) for i in range(half)]
  if scaling:
    frequency = [wavelength_scaled(f, *scaling) for f in frequency]
  z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.array(frequency))
  return np.concatenate([z.real, z.imag])


def attention(x, p, model, scaling):
  """One sequence `[T, D]` without padding."""
  length, width, group = len(x), model.head_dim, model.heads // model.kv_heads
  q, k, v = (x @ p[name]['kernel'] + p[name].get('bias', 0) for name in 'qkv')
  out = np.zeros((length, model.heads * width))
  for head in range(model.heads):
    mine = slice(head * width, (head + 1) * width)
    shared = slice(head // group * width, (head // group + 1) * width)
    queries, keys = q[:, mine], k[:, shared]
    if model.qk_norm:
      queries = rms_norm(queries, p['q_norm']['scale'], model.norm_eps)
      keys = rms_norm(keys, p['k_norm']['scale'], model.norm_eps)
    queries = [rotate(queries[t], t, model.rope_theta, scaling) for t in range(length)]
    keys = [rotate(keys[t], t, model.rope_theta, scaling) for t in range(length)]
    for t in range(length):
      seen = range(max(0, t + 1 - (model.window or length)), t + 1)
      score = np.array([queries[t] @ keys[s] for s in seen]) / math.sqrt(width)
      score = np.exp(score - score.max())
      out[t, mine] = score / score.sum() @ v[seen.start : seen.stop, shared]
  return out @ p['o']['kernel']


def logits(model, params, tokens, scaling=None):
  """Logits `f64[T, V]` of one sequence; `params` are float64 arrays."""
  x = params['embed']['embedding'][tokens]
  blocks = params['blocks']
  pick = lambda tree, i: {k: pick(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
  for i in range(model.layers):
    p = pick(blocks, i)
    y = rms_norm(x, p['attn_norm']['scale'], model.norm_eps)
    x = x + attention(y, p['attn'], model, scaling)
    y = rms_norm(x, p['mlp_norm']['scale'], model.norm_eps)
    gate = y @ p['mlp']['gate']['kernel']
    x = x + gate / (1 + np.exp(-gate)) * (y @ p['mlp']['up']['kernel']) @ p['mlp']['down']['kernel']
  x = rms_norm(x, params['final_norm']['scale'], model.norm_eps)
  return x @ (params['embed']['embedding'].T if model.tied else params['head']['kernel'])
