"""The devices a plan can be made for: TPU slices, NVIDIA cards, and what is here.

A target is a name: `v5e:2x2` (a TPU generation and its slice, in chips), `h100-80g*8` (a card, and
how many of them on one host), `local` (the devices of this process) or `cpu` (those of its CPU).
The facts of each generation and card, with their sources, are in `cards.json`.
"""

import difflib
import functools
import importlib.util
import json
import math
import pathlib
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from memjax.plan import memory

_FACTS = pathlib.Path(__file__).with_name('cards.json')
_SLICE = re.compile(r'([a-z0-9]+):([1-9][0-9]*(?:x[1-9][0-9]*){1,2})')
_CARDS = re.compile(r'([a-z0-9-]+?)(?:\*([1-9][0-9]*))?')
_HOST = 16  # Cards of one host, at most: what NVIDIA has sold in one (DGX-2).

# What every card since Turing has in common (CUDA C++ Programming Guide, technical specifications).
# cuDNN is the version that the plans were checked with; what XLA fuses may depend on it.
_CARD_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: {threads_per_core_limit}
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 }}
device_description_str: "{description}"
"""


class Target(NamedTuple):
  """A device, and how many of them."""

  name: str  # As the user writes it.
  platform: str  # 'tpu', 'gpu' or 'local'.
  kind: str  # 'v5e', 'h100-80g'; of local devices, what JAX calls them.
  devices: int  # That JAX sees; some TPU chips are two devices.
  limit_bytes: int | None  # Memory of one device; None when nobody says.


def parse(name: str) -> Target:
  """Returns the target of a name.

  >>> parse('v5e:2x2').devices, parse('h100-80g*8').devices
  (4, 8)

  Raises:
    ValueError: for a name that is no target, with the nearest one.
  """
  if name in ('local', 'cpu'):
    return _local(name)
  if (match := _SLICE.fullmatch(name)) and match[1] in _facts()['tpus']:
    return _slice(name, match[1], tuple(map(int, match[2].split('x'))))
  if (match := _CARDS.fullmatch(name)) and match[1] in _facts()['cards']:
    return _cards(name, match[1], int(match[2] or 1))
  raise ValueError(
    f'there is no target {name!r}; {_nearest(name)}. A TPU target is a generation and its slice in '
    'chips, as v5e:2x2, a GPU target a card and how many, as h100-80g*8; --list-targets shows them'
  )


def known() -> list[dict]:
  """Returns one row per kind of device: `name` (an example for TPUs), `platform`, `devices`,
  `limit_bytes` per device and `source`.
  """
  rows = []
  for kind, facts in _facts()['tpus'].items():
    target = parse(_smallest(kind))
    rows.append(_row(target, facts['source']))
  for kind, facts in _facts()['cards'].items():
    rows.append(_row(parse(kind), facts['source']))
  return rows


def check_installed(target: Target) -> None:
  """Raises a `ValueError` when the compiler of a target is not installed, with the command that
  installs it.
  """
  if target.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f"{target.name}: the TPU compiler is not installed; pip install 'memjax[plan]'"
    )
  if target.platform == 'gpu' and not _has_cuda():
    raise ValueError(
      f"{target.name}: the GPU compiler is not installed; pip install 'memjax[plan-gpu]' (about 3 "
      'GB)'
    )


def open_devices(target: Target) -> list[jax.Device]:
  """Returns the devices of a target, to compile for and not to run on.

  Only in a process with `memjax.plan.compiler.ENVIRONMENT`: the compiler looks for devices of its
  own otherwise, and stays loaded. `local` needs no preparation.

  Raises:
    ValueError: when the compiler is missing, or knows no such slice.
  """
  if target.platform == 'local':
    return jax.devices(_backend(target.name))
  check_installed(target)
  try:
    if target.platform == 'tpu':
      return _topology('tpu', target.name, **_chip_config(target.kind))
    text = card_text(target.kind)
    return _topology('cuda', target.kind, topology=f'1x1x{target.devices}', target_config=text)
  except (RuntimeError, NotImplementedError) as e:  # Of jaxlib.
    if target.platform == 'gpu':  # Any card will do for a compiler that starts.
      raise ValueError(
        f"{target.name}: the GPU compiler does not start, as when NVIDIA's libraries are missing; "
        f"pip install 'memjax[plan-gpu]' (about 3 GB): {e}"
      ) from e
    raise ValueError(f'{target.name}: the compiler knows no such device: {e}') from e


def card_text(kind: str) -> str:
  """Returns XLA's description of a card, a GpuTargetConfigProto in text form."""
  facts = _facts()['cards'][kind]
  major, minor = facts['cuda_compute_capability']
  return _CARD_TEXT.format(major=major, minor=minor, **facts)


def facts_text(target: Target) -> str:
  """Returns all that a compiler is told of a target beside its name; '' of what is here."""
  if target.platform == 'gpu':
    return card_text(target.kind)
  return json.dumps(_chip_config(target.kind)) if target.platform == 'tpu' else ''


def _chip_config(kind: str) -> dict:
  """How libtpu is asked for the devices of a runtime, where that is not its own default."""
  facts = _facts()['tpus'][kind]
  return {name: facts[name] for name in ('chip_config_name',) if name in facts}


def _topology(platform, name, **options):
  """The one place that asks jax for devices that are not here."""
  return topologies.get_topology_desc(name, platform, **options).devices


def _local(name) -> Target:
  device = jax.local_devices(backend=_backend(name))[0]  # Of another process it would tell nothing.
  count = jax.device_count(_backend(name))
  return Target(name, 'local', device.device_kind, count, memory.limit_bytes(device))


def _backend(name: str) -> str | None:
  return 'cpu' if name == 'cpu' else None  # None is JAX's own choice.


def _slice(name, kind, sizes) -> Target:
  facts = _facts()['tpus'][kind]
  devices = math.prod(sizes) * facts['devices_per_chip']
  return Target(name, 'tpu', kind, devices, facts['limit_bytes'])


def _cards(name, kind, count) -> Target:
  if count > _HOST:
    raise ValueError(f'{name}: {count} cards are more than one host holds; at most {kind}*{_HOST}')
  return Target(name, 'gpu', kind, count, _facts()['cards'][kind]['device_memory_size'])


def _smallest(kind: str) -> str:
  return f'{kind}:' + 'x'.join('1' * _facts()['tpus'][kind]['dimensions'])


def _row(target: Target, source: str) -> dict:
  fields = ('name', 'platform', 'devices', 'limit_bytes')
  return {field: getattr(target, field) for field in fields} | {'source': source}


def _nearest(name: str) -> str:
  kinds = [*_facts()['tpus'], *_facts()['cards'], 'local']
  kind, sign, rest = re.match(r'([^:*]*)([:*]?)(.*)', name.lower()).groups()
  close = [k for k in kinds if kind and k.startswith(kind)]
  close = close or difflib.get_close_matches(kind, kinds, n=1, cutoff=0.5)
  if not close:
    return f'there are {", ".join(kinds)}'
  kind = close[0]
  if kind in _facts()['tpus']:
    kind = f'{kind}:{rest}' if re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', rest) else _smallest(kind)
  elif sign == '*' and re.fullmatch(r'[1-9]\d*', rest):
    kind = f'{kind}*{rest}'
  return f'the nearest is {kind!r}'


def _has_cuda() -> bool:
  if importlib.util.find_spec('jax_plugins') is None:
    return False
  return any(importlib.util.find_spec(f'jax_plugins.xla_cuda{n}') for n in (12, 13))


@functools.cache
def _facts() -> dict:
  return json.loads(_FACTS.read_text())
