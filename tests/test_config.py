"""Configs: defaults, arguments, and what is refused before anything is allocated."""

import math

import pytest

from memjax import config as config_lib
from memjax import optimizers, ranges, same_run


def test_the_default_config_is_valid():
  config_lib.validate(config_lib.default())


def test_a_misspelt_field_is_refused_where_it_is_written_with_the_nearest():
  c = config_lib.default()
  with pytest.raises(AttributeError, match='steps'):
    c.stepz = 3


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (lambda c: c.update(setps=3), "config.setps does not exist; the nearest is 'steps'"),
    (lambda c: c.mesh.update(fsbp=3), "config.mesh.fsbp does not exist; the nearest is 'fsdp'"),
    (lambda c: c.update(seed=1.5), 'config.seed takes a int, not 1.5'),
    (lambda c: c.update(accumulate=3), 'batch_size 8 is not a multiple of config.accumulate 3'),
    (lambda c: c.update(param_dtype='bf16'), "param_dtype 'bf16' does not exist"),
    (lambda c: c.schedule.update(name='cosin'), "the nearest is 'cosine'"),
    (lambda c: c.update(remat='ful'), "remat 'ful' does not exist; the nearest is 'full'"),
    (lambda c: c.groups.update(size=2), "config.groups.size is 2, which config.step='whole_tree'"),
    (
      lambda c: c.groups.update(keep=True),
      "does not read; leave it out, or set config.step to 'lisa'",
    ),
    (lambda c: c.groups.update(ends=True), "or set config.step to 'badam'"),
    (lambda c: c.update(offload_state=-0.5), 'config.offload_state is -0.5; it is a fraction'),
    (lambda c: c.optimizer.update(weight_dekay=1.0), "the nearest is 'weight_decay'"),
    (lambda c: c.optimizer.update(name='galor'), "the nearest is 'galore'"),
  ],
)
def test_what_cannot_work_is_refused_in_a_sentence(change, sentence):
  c = config_lib.ConfigDict(
    config_lib.default().to_dict(), type_safe=False
  )  # Unlocked: a user's own.
  change(c)
  with pytest.raises(ValueError) as error:
    config_lib.validate(c)
  assert sentence in str(error.value)


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('steps', 0, 'at least 1'),
    ('hybrid.layers', 0, 'at least 1'),
    ('clip_norm', -1.0, 'at least 0'),
    ('clip_norm', math.nan, 'at least 0'),
    ('eval_tokens', -5, 'at least 0'),
    ('eval_every', -1, 'at least 0'),
    ('sample.tokens', -1, 'at least 0'),
    ('sample.temperature', -1.0, 'at least 0'),
    ('checkpoint.keep_every', -1, 'at least 0'),
    ('schedule.final_ratio', -2.0, 'at least 0'),
    ('schedule.warmup_ratio', 1.0, 'at least 0 and below 1'),
    ('cpu_devices', -3, 'at least 0'),
    ('layer_scale', math.nan, 'above 0'),
    ('layer_scale', math.inf, 'above 0'),
    ('optimizer.learning_rate', -1.0, 'at least 0'),
    ('optimizer.learning_rate', math.nan, 'at least 0'),
    ('optimizer.b1', 2.0, 'at least 0 and below 1'),
    ('data.validation_fraction', 0.0, 'above 0 and below 1'),
    ('seed', 2**70, 'a number of 64 bits'),
  ],
)
def test_a_number_out_of_its_range_is_refused(field, value, words):
  c = config_lib.default()
  c.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError) as error:
    config_lib.validate(c)
  assert str(error.value) == f'config.{field} is {value}; it must be {words}'


def test_every_range_is_of_a_field_that_exists():
  every = optimizers.OPTIMIZERS | optimizers.ZEROTH_ORDER
  known = {f'optimizer.{argument}' for name in every for argument in optimizers.arguments(name)}
  known |= set(dict(same_run.leaves(config_lib.default().to_dict())))
  assert {field for fields in ranges.RANGES.values() for field in fields} <= known


def test_a_config_that_lacks_a_field_says_where_to_start():
  fields = config_lib.default().to_dict()
  del fields['mesh']['tensor']
  with pytest.raises(ValueError, match=r'mesh.tensor is missing.*default\(\)'):
    config_lib.validate(config_lib.ConfigDict(fields))


def test_optimizer_fills_in_every_argument_and_refuses_unknown_ones():
  part = config_lib.optimizer('galore', learning_rate=0.01, rank=4)
  assert (part.rank, part.refresh_every, part.side) == (4, 200, 'short')
  with pytest.raises(ValueError, match="no argument 'rnak'; the nearest is 'rank'"):
    config_lib.optimizer('galore', learning_rate=0.01, rnak=4)
  with pytest.raises(ValueError, match='needs learning_rate'):
    config_lib.optimizer('galore', rank=4)


def test_changing_only_the_name_of_the_optimizer_leaves_foreign_arguments_unread():
  c = config_lib.default()
  c.optimizer = config_lib.optimizer('galore', learning_rate=0.01, rank=4)
  c.optimizer.name = 'adamw'
  config_lib.validate(c)


@pytest.mark.parametrize(
  ('arg', 'sentence'),
  [
    ('smok', "the nearest is 'smoke'"),
    ('rank=x', "argument 'rank' takes a int, as in rank=..., not 'x'"),
    ('rank', 'takes a int'),
  ],
)
def test_bad_config_arguments(arg, sentence):
  with pytest.raises(ValueError) as error:
    config_lib.parse_arg(arg, smoke=False, rank=8)
  assert sentence in str(error.value)


def test_a_resumed_run_may_change_where_and_how_long_but_not_what():
  old = config_lib.default().to_dict()
  c = config_lib.default()
  c.mesh.fsdp, c.steps, c.checkpoint.every = 8, 2000, 7
  notices = same_run.check(old, c.to_dict())
  assert [n.split(':')[0] for n in notices] == ['checkpoint.every', 'mesh.fsdp', 'steps']
  assert notices[2].endswith('; the schedule of the learning rate now spans these steps')
  c.optimizer.learning_rate = 3e-4
  with pytest.raises(
    ValueError, match=r'optimizer.learning_rate: 0.001 there, 0.0003 here.*workdir'
  ):
    same_run.check(old, c.to_dict())


def test_a_field_that_is_newer_than_a_run_had_its_default_there():
  new = config_lib.default().to_dict()
  old = config_lib.default().to_dict()
  del old['hybrid'], old['optimizer']['eps'], old['clip_norm']
  assert same_run.check(old, new) == []
  new['clip_norm'] = 1.0
  with pytest.raises(ValueError, match=r'\(clip_norm: 0.0 there, 1.0 here\)'):
    same_run.check(old, new)
