"""Command lines: what is wrong with one is said in a sentence."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from memjax import build_model, command

SMOKE = 'configs/quickstart.py:smoke'


def parse(monkeypatch, *words):
  """Parses a command line as run.py does; returns its config."""
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  argv = ['run.py', *words]
  monkeypatch.setattr(sys, 'argv', argv)  # Where overrides are looked for.
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # The config file of before.
  config = config_flags.DEFINE_config_file('config', None, flag_values=flags.FLAGS)
  command.parser('run.py', config)(argv)
  return config.value


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    ([f'--config={SMOKE}', '--config.setps=3'], "no field 'setps'; the nearest is 'steps'"),
    (['--config', SMOKE, '--config.setps=3'], "no field 'setps'; the nearest is 'steps'"),
    (['--config', SMOKE, '--config.setps', '3'], "no field 'setps'; the nearest is 'steps'"),
    ([f'--config={SMOKE}', '--config.model_args.vocap=9'], "the nearest is 'vocab'"),
    (['--config=memjax/recipes.py'], 'memjax/recipes.py is no config file: it has no function'),
    ([f'--config={SMOKE}', 'steps=3'], "unknown argument 'steps=3'; options begin with --"),
    ([], 'say which experiment'),
  ],
)
def test_a_wrong_command_line_is_a_sentence(monkeypatch, words, said):
  with pytest.raises(SystemExit) as error:
    parse(monkeypatch, *words)
  assert said in str(error.value)


def test_any_field_of_the_model_can_be_overridden(monkeypatch):
  fields = dict(vocab=257, tied=True, rope_theta=5e5, kv_heads=2)
  words = [f'--config.model_args.{name}={value}' for name, value in fields.items()]
  config = parse(monkeypatch, f'--config={SMOKE}', *words)
  model = build_model.bare_model(config)
  assert {name: getattr(model, name) for name in fields} == fields


def test_a_field_of_another_family_is_refused(monkeypatch):
  config = parse(monkeypatch, f'--config={SMOKE}', '--config.model_args.rotary_dim=8')
  with pytest.raises(ValueError, match="Llama has no field 'rotary_dim'; "):
    build_model.bare_model(config)


def test_one_source_needs_no_tuple(monkeypatch):
  config = parse(monkeypatch, f'--config={SMOKE}', '--config.data.sources=text:corpus/*.txt')
  assert config.data.sources == ('text:corpus/*.txt',)


@pytest.mark.parametrize(
  ('raised', 'code'),
  [
    (ValueError('why'), 'run.py: why'),
    (OSError(28, 'No space left', 'file'), "run.py: [Errno 28] No space left: 'file'"),
    (KeyboardInterrupt(), 130),
  ],
)
def test_what_main_raises_becomes_an_exit_code(raised, code):
  def main():
    raise raised

  with pytest.raises(SystemExit) as error:
    command.run('run.py', main)
  assert str(error.value.code).partition('\n')[0] == str(code)
