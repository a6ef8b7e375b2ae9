"""A work directory: whose it is, and what is said of one that cannot be used."""

import json
import types

import pytest

from memjax import config as config_lib
from memjax import workdir


def test_a_second_run_in_one_directory_is_refused_while_the_first_lasts(tmp_path):
  refused = pytest.raises(ValueError, match='in use by another run; wait for its end, or choose')
  with workdir.lock(tmp_path), refused, workdir.lock(tmp_path):
    pass
  with workdir.lock(tmp_path):
    pass


def test_the_address_of_a_bucket_is_no_folder():
  with pytest.raises(ValueError, match=r"'gs://bucket/run' is an address.*name a folder"):
    workdir.local('gs://bucket/run')


def dataset(**changes):
  fields = dict(source='stdlib', missing=(), fingerprint='8 00ff', size=300) | changes
  tokenizer = types.SimpleNamespace(vocab_size=fields.pop('size'))
  return types.SimpleNamespace(counts=lambda: (9, 3, 'tokens'), tokenizer=tokenizer, **fields)


def test_other_tokens_of_the_same_number_are_refused(tmp_path):
  c = config_lib.default()
  workdir.record(tmp_path, c, dataset())
  workdir.record(tmp_path, c, dataset(missing=('more',)))
  with pytest.raises(ValueError, match="began with data fingerprint '8 00ff' and now finds '8 1'"):
    workdir.record(tmp_path, c, dataset(fingerprint='8 1'))


def test_a_record_without_a_field_says_nothing_about_it(tmp_path):
  workdir.record(tmp_path, config_lib.default(), dataset())
  kept = json.loads((tmp_path / 'data.json').read_text())
  del kept['vocabulary'], kept['fingerprint']
  (tmp_path / 'data.json').write_text(json.dumps(kept))
  workdir.record(tmp_path, config_lib.default(), dataset())


@pytest.mark.parametrize('text', ['{"torn": ', '[1]', ''])
def test_a_damaged_file_is_named(tmp_path, text):
  for name in ('config.json', 'data.json'):
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=r'config.json is damaged \(.*\); remove it'):
    workdir.prepare(tmp_path, config_lib.default())
  with pytest.raises(ValueError, match=r'data.json is damaged \(.*\); remove it'):
    workdir.record(tmp_path, config_lib.default(), dataset())
