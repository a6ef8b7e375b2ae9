"""Each scheme yields its documents; what is not there is said with the way to get it."""

import gzip
import json
import subprocess
import sys

import pytest

from memjax.data.sources import open_first


def documents(*schemes):
  return list(open_first(schemes)[0].documents())


def test_stdlib_is_python_without_tests_or_tables():
  pieces = documents('stdlib')
  text = ''.join(pieces)
  assert 3_000_000 < len(text) < 40_000_000
  assert 'class JSONDecoder' in text
  assert 'class IsolatedAsyncioTestCase' in text  # unittest is library code, tests of it are not.
  assert 'class TestJSONEncoder' not in text
  assert 'decoding_table = (' not in text
  assert sorted(map(len, pieces))[-10] < 200_000
  assert pieces == documents('stdlib')


def test_stdlib_pieces_begin_at_definitions_and_lose_nothing():
  import argparse
  import pathlib

  text = pathlib.Path(argparse.__file__).read_text()
  pieces = documents('stdlib')
  first = next(i for i, p in enumerate(pieces) if text.startswith(p) and len(p) > 100)
  rejoined, last = '', first
  while len(rejoined) < len(text):
    rejoined += pieces[last]
    last += 1
  assert rejoined == text
  assert last - first > 3
  assert all(p.startswith(('def ', 'class ', '@')) for p in pieces[first + 1 : last])


def test_text_is_a_document_a_file_in_sorted_order(tmp_path):
  (tmp_path / 'b.txt').write_text('second', encoding='utf-8')
  (tmp_path / 'a.txt').write_text('first, ünïcode', encoding='utf-8')
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / 'c.txt').write_text('third')
  assert documents(f'text:{tmp_path}/*.txt') == ['first, ünïcode', 'second']
  assert documents(f'text:{tmp_path}/**/*.txt') == ['first, ünïcode', 'second', 'third']


@pytest.mark.parametrize('end', ['\n\n', '\n', ' ', 'ä'])
def test_long_text_is_cut_at_the_best_place_there_is(tmp_path, end):
  text = ('ä' * 99 + end) * 300
  (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
  pieces = documents(f'text:{tmp_path}/a.txt')
  assert ''.join(pieces) == text
  assert len(pieces) > 5
  assert all(4000 <= len(piece) <= 8000 for piece in pieces[:-1])
  assert all(piece.endswith(end) for piece in pieces)


@pytest.mark.parametrize('torn', [False, True])
def test_a_torn_archive_is_named(tmp_path, torn):
  content = gzip.compress(b'{"text": "torn"}\n' * 99)[:-9] if torn else b'no archive'
  (tmp_path / 'a.jsonl.gz').write_bytes(content)
  with pytest.raises(ValueError, match=r'a\.jsonl\.gz: cannot be read \(.*; fetch the file again'):
    documents(f'jsonl:{tmp_path}/a.jsonl.gz:text')


def test_text_that_is_not_utf8_names_the_file(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match=r'a\.txt: not UTF-8'):
    documents(f'text:{tmp_path}/a.txt')


def test_jsonl_is_a_document_a_line(tmp_path):
  lines = [json.dumps({'text': t, 'url': 'x'}) for t in ('one', 'two: "2"', 'half \ud800 a pair')]
  (tmp_path / 'a.jsonl').write_text('\n'.join([lines[0], '', *lines[1:]]) + '\n')
  expected = ['one', 'two: "2"', 'half ? a pair']
  assert documents(f'jsonl:{tmp_path}/a.jsonl:text') == expected
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as file:
    file.write('\n'.join(lines))
  assert documents(f'jsonl:{tmp_path}/*.gz:text') == expected


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('{"text": "cut', r'expected a JSON object with field'),
    ('{"body": "x"}', r"with field 'text' \(KeyError"),
    ('["text"]', r'expected a JSON object'),
    ('{"text": 3}', r"field 'text' is int, not a string"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
  (tmp_path / 'a.jsonl').write_text('{"text": "good"}\n' + line + '\n')
  with pytest.raises(ValueError, match=rf'a\.jsonl, line 2: .*{said}'):
    documents(f'jsonl:{tmp_path}/a.jsonl:text')


def test_sources_are_read_lazily(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "good"}\nbad\n')
  assert next(open_first([f'jsonl:{tmp_path}/a.jsonl:text'])[0].documents()) == 'good'


def test_the_next_source_is_taken_and_the_missing_one_told(tmp_path):
  (tmp_path / 'a.txt').write_text('here')
  absent = f'text:{tmp_path}/absent/*.txt'
  source, missing = open_first([absent, f'text:{tmp_path}/a.txt', 'stdlib'])
  assert source.scheme == f'text:{tmp_path}/a.txt'
  assert len(missing) == 1
  assert missing[0].startswith(absent)
  assert 'no file matches' in missing[0]


def test_no_source_left_lists_all(tmp_path):
  with pytest.raises(ValueError) as error:
    open_first([f'text:{tmp_path}/x', f'jsonl:{tmp_path}/y:text', f'tfds:nope@{tmp_path}'])
  for said in (f'{tmp_path}/x', f'{tmp_path}/y', f'tfds:nope@{tmp_path}: '):
    assert said in str(error.value)


@pytest.mark.parametrize(
  ('schemes', 'said'),
  [
    (['stdlb'], "unknown scheme 'stdlb'; the nearest is 'stdlib'"),
    (['stdlib', 'json:/x:text'], "the nearest is 'jsonl'"),
    (['text:'], "write 'text:GLOB'"),
    (['stdlib:x'], "write 'stdlib'"),
    (['jsonl:/x'], "write 'jsonl:GLOB:FIELD'"),
    ([], "'stdlib' is on every machine"),
  ],
)
def test_a_scheme_that_is_wrong_is_corrected(schemes, said):
  with pytest.raises(ValueError, match=said):
    open_first(schemes)


def test_identity_follows_the_files(tmp_path):
  scheme = f'text:{tmp_path}/*.txt'
  (tmp_path / 'a.txt').write_text('one')
  before = open_first([scheme])[0].identity
  assert open_first([scheme])[0].identity == before
  (tmp_path / 'b.txt').write_text('two')
  assert open_first([scheme])[0].identity != before


TFDS = """
import sys
import tensorflow_datasets as tfds

class TinyText(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')
  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()})
    )
  def _split_generators(self, downloads):
    return {'train': ((i, {'text': f'document {i} é'}) for i in range(20))}
  def _generate_examples(self):
    pass

directory, file_format = sys.argv[1:]
TinyText(data_dir=directory, file_format=file_format).download_and_prepare()

from memjax.data.sources import open_first
for name in ('tiny_text', 'tiny_text:1.2.0'):
  source, _ = open_first([f'tfds:{name}@{directory}'])
  assert sorted(source.documents()) == sorted(f'document {i} é' for i in range(20))
  assert list(source.documents()) == list(source.documents())
try:
  open_first([f'tfds:tiny_text:9.9.9@{directory}'])
except ValueError as error:
  assert "file_format='array_record').download_and_prepare()" in str(error), error
else:
  raise SystemExit('a version that is not there was found')
assert 'tensorflow' not in sys.modules
"""


def test_tfds_reads_a_prepared_dataset_without_tensorflow(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  done = subprocess.run(
    [sys.executable, '-c', TFDS, str(tmp_path), 'array_record'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_tfds_that_is_not_installed_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(ValueError, match=r"pip install 'memjax\[tfds\]'"):
    open_first(['tfds:c4/en'])
