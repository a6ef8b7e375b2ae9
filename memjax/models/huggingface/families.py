"""The families that can be read and written, and how one is found."""

from typing import Any

from memjax.models.huggingface import bert, gpt2, llama, opt, phi
from memjax.models.huggingface.family import Config, Family
from memjax.naming import nearest

# By `model_type`. `save` writes the first that holds a model.
FAMILIES: dict[str, Family] = {
  family.name: family
  for family in (
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    llama.PHI3,
    opt.OPT,
    gpt2.GPT2,
    phi.PHI,
    bert.BERT,
    bert.ROBERTA,
  )
}


def of_config(config: Config) -> Family:
  """Returns the family of a `config.json`, by `architectures` or else by `model_type`.

  Raises:
    ValueError: for one that is unknown, naming the file, the field and the nearest known.
  """
  given = config.get('architectures') or []
  known = {name: family for family in FAMILIES.values() for name in family.architectures}
  for name in given:
    if name in known:
      return known[name]
  if given:
    raise ValueError(
      f"{config.path}: 'architectures' is {given}, which is not supported; "
      f'{nearest(given[0], known)}'
    )
  kind = config['model_type']
  if kind not in FAMILIES:
    raise ValueError(
      f"{config.path}: 'model_type' {kind!r} is not supported; {nearest(kind, FAMILIES)}"
    )
  return FAMILIES[kind]


def of_model(model: Any) -> Family:
  """Returns the first family that holds a model of ours.

  Raises:
    ValueError: when none does.
  """
  for family in FAMILIES.values():
    if family.holds(model):
      return family
  raise ValueError(
    f'no Hugging Face family has the fields of {model}; those that are written are '
    f'{", ".join(FAMILIES)}'
  )
