"""The largest batch, the comparison of ways, and ways out, over a made-up compiler."""

import types

import jax
import jax.numpy as jnp
import pytest

from memjax import build, config, optimizers, sharding
from memjax.plan import compiler, here, memory, planning, recommend, search, work
from memjax.plan.receipt import receipt


@pytest.mark.parametrize('true', [0, 1, 2, 3, 4, 5, 7, 8, 11, 63, 64, 100, 1000])
def test_the_largest_is_found_with_few_questions(true):
  asked = []

  def measure(counts):
    assert 1 <= len(counts) <= 2
    assert min(counts) >= 1
    asked.extend(counts)
    return [k <= true for k in counts]

  assert search.largest(measure) == true
  assert len(asked) == len(set(asked))  # Nothing is compiled twice.
  assert len(asked) <= 4 * max(1, true.bit_length()) + 2


def test_what_never_ends_is_refused():
  with pytest.raises(ValueError, match='does not seem to depend on the batch'):
    search.largest(lambda counts: [True for _ in counts])


@pytest.mark.parametrize(
  ('mesh', 'devices', 'unit'),
  [
    (dict(data=-1, fsdp=1, tensor=1), 4, 4 * 2),
    (dict(data=1, fsdp=-1, tensor=4), 8, 2 * 2),
    (dict(data=2, fsdp=2, tensor=2), 8, 4 * 2),
  ],
)
def test_batches_divide_over_the_mesh_and_the_micro_batches(mesh, devices, unit):
  c = config.default()
  c.mesh.update(mesh)
  c.accumulate = 2
  assert search.batch_unit(c, devices) == (unit, unit)


def test_a_pool_holds_what_is_kept_and_divides_into_its_parts():
  c = config.default()
  c.accumulate = 2
  c.select.update(name='random', keep=20, parts=3)
  assert search.batch_unit(c, 4) == (24, 24)
  c.select.keep = 32
  assert search.batch_unit(c, 4) == (24, 48)


def fake_report(job, peak, limit=1000):
  arguments = dict(parameters=100, adapters=0, basis=0, moments=0, other_state=0, batch=0)
  return dict(
    target=job['target'],
    platform='tpu',
    devices=4,
    fits=None if limit is None else peak <= limit,
    limit_bytes=limit,
    peak_bytes=peak,
    host_bytes=0,
    argument_bytes=None,
    parts=arguments,
    gradients=0,
    compiled={},
    collectives={},
    compile_seconds=0.0,
    cached=False,
    error=None,
  )


@pytest.fixture
def fake(monkeypatch):
  """A compiler of which a program needs what `fake.peak(fields)` says."""
  peak = lambda fields: 100 + 10 * fields['batch_size']
  fake = types.SimpleNamespace(limit=1000, asked=[], peak=peak)

  def compile_jobs(jobs, *, cache_dir=None, on_done=None, **_):
    reports = []
    for i, job in enumerate(jobs):
      fake.asked.append(job['config'])
      peak = fake.peak(job['config'])
      if isinstance(peak, str):
        report = {'target': job['target'], 'fits': None, 'error': peak, 'kind': 'refused'}
      else:
        report = fake_report(job, peak, fake.limit)
      reports.append(report)
      if on_done:
        on_done(i, report)
    return reports

  monkeypatch.setattr(compiler, 'compile_jobs', compile_jobs)
  return fake


def test_the_largest_batch_of_a_target(fake):
  c = config.default()
  said = []
  best, found = search.largest_batch(c, 'v5e:2x2', say=lambda *a: said.append(a))
  assert best == 88  # (1000 - 100) / 10 = 90, in fours.
  assert found['peak_bytes'] == 980
  assert all(fields['batch_size'] % 4 == 0 for fields in fake.asked)
  assert len(said) == len(fake.asked)


def test_a_pool_of_rows_is_searched_from_what_is_kept(fake):
  c = config.default()
  c.select.update(name='random', keep=16)
  best, _ = search.largest_batch(c, 'v5e:2x2')
  assert best == 88
  assert min(fields['batch_size'] for fields in fake.asked) == 16


def test_a_batch_whose_compile_dies_ends_the_search_with_what_fits(fake):
  fake.peak = lambda fields: (
    100 if fields['batch_size'] <= 20 else 'v5e:2x2: the compiler was killed'
  )
  said = []
  best, found = search.largest_batch(config.default(), 'v5e:2x2', say=lambda *a: said.append(a))
  assert (best, found['peak_bytes']) == (20, 100)
  assert any('batch 24 could not be compiled' in note for note in found['notes'])
  assert (24, 'v5e:2x2: the compiler was killed') in said


def test_no_batch_fits(fake):
  fake.limit = 110
  best, found = search.largest_batch(config.default(), 'v5e:2x2')
  assert best == 0
  assert found['fits'] is False


def test_a_target_without_a_known_limit_has_no_largest_batch(fake):
  fake.limit = None
  with pytest.raises(ValueError, match='limit is not known'):
    search.largest_batch(config.default(), 'v5e:2x2')


def tiny():
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_tiny', 4, 16
  c.model_args = dict(loss_chunk=64)
  return c


@pytest.fixture
def three_methods(monkeypatch):
  known = {name: optimizers.OPTIMIZERS[name] for name in ('adamw', 'galore', 'sgd')}
  monkeypatch.setattr(optimizers, 'OPTIMIZERS', known)


def test_recommended_are_those_that_fit_first_then_by_peak(fake, three_methods, monkeypatch):
  blocks = {'none': 1.0, 'full': 1.25}
  monkeypatch.setattr(work, 'step_flops', lambda c: 1e9 * blocks.get(c.remat, 1.5))

  def peak(fields):
    if fields['optimizer']['name'] == 'sgd' and fields['step'] == 'layerwise':
      return 'v5e:2x2: not for this method'
    size = {'adamw': 3000, 'galore': 500, 'sgd': 400}.get(fields['optimizer']['name'], 2000)
    return size + (100 if fields['remat'] == 'none' else 0)

  fake.peak = peak
  rows, failed, total = recommend.recommend(tiny(), 'v5e:2x2', compiles=20)
  assert total == 3 * 5 * 3  # Methods, ways of the backward pass, precisions.
  assert len(fake.asked) == 20
  # The config's own way first, then what is near it: of all three a few.
  asked = [(f['optimizer']['name'], f['remat'], f['param_dtype']) for f in fake.asked]
  assert asked[:2] == [('adamw', 'none', 'float32'), ('sgd', 'none', 'float32')]
  assert [len(set(column)) for column in zip(*asked)] == [3, 4, 2]
  assert failed == {
    'v5e:2x2: not for this method': ['sgd layerwise float32', 'sgd layerwise bfloat16']
  }
  assert len(rows) == 18
  assert [row['fits'] for row in rows] == sorted([row['fits'] for row in rows], reverse=True)
  assert (rows[0]['method'], rows[0]['backward']) == ('sgd', 'full')
  work_of = {(r['method'], r['backward'], r['precision']): r['relative_work'] for r in rows}
  assert work_of['adamw', 'none', 'float32'] == 1.0
  assert work_of['adamw', 'full', 'float32'] == 1.25
  galore = next(f['optimizer'] for f in fake.asked if f['optimizer']['name'] == 'galore')
  assert galore['rank'] == 16  # A quarter of the width.
  shown = recommend.table(rows, 'ways')
  assert list(shown.columns[0].cells) == [row['method'] for row in rows]


@pytest.mark.slow
def test_what_only_one_method_or_step_can_do_is_left_to_it(fake, three_methods, monkeypatch):
  """AdamW has no subspace to add up in, and the ordinary step no state on the host."""
  c = tiny()
  c.optimizer = config.optimizer('galore', learning_rate=0.01, rank=4)
  c.accumulate, c.accumulate_in = 2, 'subspace'
  rows, _, _ = recommend.recommend(c, 'v5e:2x2', compiles=8)
  assert len(rows) == 8
  for *_, variant in recommend.variants(c):
    config.validate(variant)
  c.update(step='hift', accumulate=1, accumulate_in='weights', offload_state=1.0)
  c.groups.size = 2
  for *_, variant in recommend.variants(c):
    config.validate(variant)


def test_a_config_without_gradients_is_compared_with_those_that_have_them(fake, three_methods):
  c = tiny()
  c.step = 'zeroth_order'
  c.optimizer = config.optimizer('mezo', learning_rate=1e-6)
  rows, _, total = recommend.recommend(c, 'v5e:2x2', compiles=4)
  assert total == 3 * 5 * 3 + 1
  (own,) = (row for row in rows if row['method'] == 'mezo')
  assert (own['backward'], own['precision']) == ('zeroth_order', 'float32')
  assert own['relative_work'] < 1


def test_when_nothing_compiles_the_first_sentence_is_the_error(fake, three_methods):
  fake.peak = lambda fields: 'v5e:2x2: a mesh that does not match'
  with pytest.raises(ValueError, match='a mesh that does not match'):
    recommend.recommend(tiny(), 'v5e:2x2', compiles=2)


def test_a_target_that_fails_takes_no_other_along(monkeypatch):
  failed = {'target': 'v5', 'fits': None, 'error': 'no target v5', 'kind': 'target'}
  sound = fake_report({'target': 'v5e:2x2'}, 500)
  monkeypatch.setattr(compiler, 'compile_jobs', lambda jobs, **_: [failed, sound, failed])
  found, errors = planning.try_plan(config.default(), ['v5', 'v5e:2x2', 'v5'])
  assert [one['target'] for one in found] == ['v5e:2x2']
  assert errors == ['no target v5']
  with pytest.raises(ValueError, match=r'^no target v5$'):
    planning.plan(config.default(), ['v5', 'v5e:2x2', 'v5'])


# ---- Work.


def test_products_and_loops_are_counted():
  x = jnp.ones((4, 8, 8))
  body = lambda carry, m: (carry @ m, None)
  scan = jax.make_jaxpr(lambda x: jax.lax.scan(body, jnp.ones((3, 8)), x)[0])(x)
  assert work.count(scan) == 4 * 2 * 3 * 8 * 8
  loop = lambda x, n: jax.lax.fori_loop(0, n, lambda i, y: y.at[i].set(y[i] @ y[i]), x)
  assert work.count(jax.make_jaxpr(loop)(x, 3), refresh_every=10) == 4 * 2 * 8**3 / 10
  branch = lambda x: jax.lax.cond(x[0, 0, 0] > 0, lambda y: y @ y, lambda y: y, x)
  assert work.count(jax.make_jaxpr(branch)(x), refresh_every=10) == 4 * 2 * 8**3 / 10


def test_a_step_takes_six_operations_a_parameter_a_token_and_eight_rematerialised():
  """And 12 B L T^2 N H of attention's scores, or 16; causal or not, all are computed."""
  c = tiny()
  model = build.build_model(c, sharding.make_mesh(devices=jax.devices()[:1]))
  params = model.abstract()
  blocks = sum(x.size for x in jax.tree.leaves(params['blocks']) if x.ndim > 2)
  tokens = c.batch_size * c.seq_len
  scores = tokens * c.seq_len * model.layers * model.heads * model.head_dim
  head = params['head']['kernel'].size
  c.optimizer = config.optimizer('sgd', learning_rate=0.1)
  # The loss is rematerialised by itself: its logits are computed twice.
  expected = 6 * blocks * tokens + 12 * scores + 8 * head * tokens
  assert work.step_flops(c) == pytest.approx(expected, rel=0.01)
  c.remat = 'full'
  expected = 8 * blocks * tokens + 16 * scores + 8 * head * tokens
  assert work.step_flops(c) == pytest.approx(expected, rel=0.05)
  c.step = 'layerwise'  # Every block runs twice there too, whatever loops a backend needs.
  assert work.step_flops(c) == pytest.approx(expected, rel=0.05)
  c.optimizer = config.optimizer('galore', learning_rate=0.1, rank=2, refresh_every=200)
  assert work.step_flops(c) == pytest.approx(expected, rel=0.15)


# ---- Ways out.


def over(peak=2000, **changes):
  return receipt(fake_report({'target': 'x'}, peak) | changes)


def test_ways_out_are_three_that_fit_the_cheapest_first():
  c = config.default()
  needs = {'remat': 1500, 'mesh.data': 900, 'step': 800, 'param_dtype': 700, 'optimizer.name': 600}
  asked = []

  def measure(changes):
    asked.append(changes)
    if 'accumulate' in changes:
      raise ValueError('it does not divide')
    return over(needs[next(iter(changes))])

  ways = here.ways_out(c, over(), measure)
  assert [next(iter(changes)) for changes, _, _ in ways] == ['mesh.data', 'step', 'param_dtype']
  assert all(after['fits'] for _, after, _ in ways)
  assert not any('optimizer.name' in changes for changes in asked)  # Three were enough.


def test_when_nothing_fits_the_ways_are_those_that_need_least():
  peaks = iter([1900, 1800, 1700, 1600, 2500, 1500, 1400, 1300])
  ways = here.ways_out(config.default(), over(), lambda changes: over(next(peaks)))
  assert [after['peak_bytes'] for _, after, _ in ways] == [1300, 1400, 1500]


def test_a_run_that_fits_or_whose_limit_nobody_knows_is_not_refused():
  here.check_fits(config.default(), over(500), [card()])
  here.check_fits(config.default(), over(5000, fits=None, limit_bytes=None), [card()])


def card(platform='gpu'):
  return types.SimpleNamespace(platform=platform, process_index=0)


def test_the_first_way_out_on_a_card_is_more_of_it_for_jax(monkeypatch):
  monkeypatch.setattr(here, 'ways_out', lambda config, found, measure: [])
  with pytest.raises(ValueError, match=r'XLA_CLIENT_MEM_FRACTION=0.94 before the command  fits'):
    here.check_fits(config.default(), over(1200), [card()])  # Three quarters are 1000.
  with pytest.raises(ValueError, match='no change of one field'):
    here.check_fits(config.default(), over(1300), [card()])
  with pytest.raises(ValueError, match='no change of one field'):
    here.check_fits(config.default(), over(1200), [card('tpu')])


def test_a_host_that_is_too_small_is_refused(monkeypatch):
  found = over(500, host_bytes=3 * 2**30)
  monkeypatch.setattr(memory, 'host_available', lambda: 5 * 2**30)
  here.check_fits(config.default(), found, [card()])
  with pytest.raises(ValueError, match=r"keeps 6.00 GiB in this host's memory, .* 5.00 GiB are"):
    here.check_fits(config.default(), found, [card(), card()])
  here.check_fits(config.default(), found, [card('cpu')] * 2)  # It is in the limit already.


def test_every_change_is_one_that_its_config_can_make():
  tried = {}
  for step in ('whole_tree', 'layerwise'):
    c = config.default()
    c.step, c.batch_size, c.accumulate = step, 16, 1
    for changes, cost, _ in here.changes_of(c, 8):
      changed = c.copy_and_resolve_references()
      changed.update_from_flattened_dict(changes)
      config.validate(changed)
      tried.setdefault(step, set()).update(changes)
      assert cost
  # Where layers' inputs stay and nothing is left to recompute, these are what helps.
  assert tried['layerwise'] - tried['whole_tree'] == {'offload_state', 'weights', 'batch_size'}


def test_the_cpu_has_a_limit_shared_by_its_virtual_devices():
  limit = memory.limit_bytes(jax.devices()[0])
  assert 2**20 < limit < 2**42
