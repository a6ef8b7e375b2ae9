"""Whether two configs are of one run, so that the second may go on where the first stopped."""

from memjax import adapters, config, optimizers

# What may differ between runs that share a work directory: nothing here changes what a finished
# step computed. With other `steps` the schedule is stretched from there on.
MAY_CHANGE = (
  'steps',
  'log_every',
  'eval_every',
  'eval_tokens',
  'checkpoint',
  'data.cache_dir',
  'mesh',
  'cpu_devices',
  'export',
  'adapter.export',
  'sample',
  'task.test',
  'task.test_examples',
)


def check(old: dict, new: dict) -> list[str]:
  """Compares the config of a work directory with the one that wants to continue there.

  A field that one of them lacks, which is older than the field, has its default.

  Returns:
    Sentences about fields that differ and may.

  Raises:
    ValueError: naming the fields that differ and may not.
  """
  known = _defaults(new)
  a, b = known | dict(leaves(old)), known | dict(leaves(new))
  different = sorted(k for k in {*a, *b} if _plain(a.get(k)) != _plain(b.get(k)))
  also = {'steps': '; the schedule of the learning rate now spans these steps'}
  lines = [f'{k}: {a.get(k)!r} there, {b.get(k)!r} here{also.get(k, "")}' for k in different]
  fatal = [
    line
    for k, line in zip(different, lines)
    if k not in MAY_CHANGE and k.split('.')[0] not in MAY_CHANGE
  ]
  if fatal:
    raise ValueError(
      'the work directory belongs to another config (' + '; '.join(fatal) + '); choose another '
      '--workdir, or delete it'
    )
  return lines


def _defaults(c: dict) -> dict:
  """The default of every field, by path: of open groups, those that the named function takes."""
  found = {k: v for k, v in leaves(config.default().to_dict()) if not k.startswith(config.OPEN)}
  for group, arguments in (('optimizer', optimizers.arguments), ('adapter', adapters.arguments)):
    found |= {f'{group}.{k}': v for k, v in arguments(c[group]['name']).items()}
  return found


def leaves(tree: dict, prefix: str = ''):
  """Yields each field of a config with its path, such as `mesh.data`."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def _plain(value):
  return list(value) if isinstance(value, tuple) else value
