"""Laws of every lag model, of the agenda that a lockstep run follows, and of traces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from anchor_service.config import AnchorConfig
from anchor_service.lag import LAGS, Due, agenda, make_draw, read_trace

N = 4000  # draws for a mean
TICKS = 400


def anchor(kind: str = "fixed", **lag: object) -> AnchorConfig:
    own = {k: lag.pop(k) for k in ("delay_k", "cadence", "max_lag") if k in lag}
    return AnchorConfig.model_validate({"lag": {"kind": kind, **lag}, **own})


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "corrections.jsonl"
    rows = [(1, 0, 4), (2, 3, None), (3, 5, 6), (4, 6, 14)]
    file.write_text("\n".join(json.dumps(dict(version=v, source_tick=s, first_tick=f, lag=1)) for v, s, f in rows))
    return file


def models(trace: Path) -> dict[str, AnchorConfig]:
    """One config of every kind."""
    found = {
        "fixed": anchor(delay_k=7),
        "uniform": anchor("uniform", low=2.0, high=9.0),
        "lognormal": anchor("lognormal", mean=8.0, sigma=0.6),
        "pareto": anchor("pareto", mean=6.0, shape=3.5),
        "markov": anchor("markov", healthy=3.0, slow=30.0, p_slow=0.2, p_heal=0.4),
        "outage": anchor("outage", lag=4.0, every=50, length=20),
        "diurnal": anchor("diurnal", mean=10.0, amplitude=0.5, period=40.0),
        "trace": anchor("trace", path=str(trace)),
    }
    assert set(found) == set(LAGS)
    return found


def draws(config: AnchorConfig, seed: int = 0, count: int = N) -> np.ndarray:
    draw = make_draw(config, seed)
    return np.array([draw(i, i) for i in range(count)], float)


# --- the models --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(LAGS))
def test_same_seed_same_lags_in_whatever_order_they_are_asked_for(kind: str, trace_file: Path):
    config = models(trace_file)[kind]
    asked = [(i, i) for i in range(60)]
    in_order = {a: make_draw(config, 3)(*a) for a in asked}
    draw = make_draw(config, 3)
    mixed = {a: draw(*a) for a in np.random.default_rng(0).permutation(asked).tolist() for a in [tuple(a)]}
    assert mixed == in_order == {a: draw(*a) for a in asked}


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "pareto", "markov"])
def test_another_seed_gives_other_lags_and_fires_differ_among_themselves(kind: str, trace_file: Path):
    config = models(trace_file)[kind]
    assert (draws(config, 0, 100) != draws(config, 1, 100)).any()
    assert len(set(draws(config, 0, 100))) > 1


def test_the_number_of_the_fire_decides_a_random_lag_and_not_the_tick():
    draw = make_draw(anchor("lognormal", mean=8.0), 0)
    assert draw(5, 10) == draw(5, 999)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("config", "mean", "deviation"),
    [
        (anchor("uniform", low=2.0, high=9.0), 5.5, 7 / 12**0.5),
        (anchor("lognormal", mean=8.0, sigma=0.6), 8.0, 8 * (np.exp(0.36) - 1) ** 0.5),
        (anchor("lognormal", delay_k=12, sigma=0.3), 12.0, 12 * (np.exp(0.09) - 1) ** 0.5),
        (anchor("pareto", mean=6.0, shape=3.5), 6.0, 6 / (3.5 * 1.5) ** 0.5),
        (anchor("diurnal", mean=10.0, amplitude=0.5, period=40.0), 10.0, 5 / 2**0.5),
    ],
)
def test_the_mean_is_what_was_asked_for(config: AnchorConfig, mean: float, deviation: float, seed: int):
    assert abs(draws(config, seed).mean() - mean) < 4 * deviation / N**0.5


@pytest.mark.parametrize("sigma", [0.2, 0.8])
def test_sigma_is_the_deviation_of_the_logarithm(sigma: float):
    assert np.log(draws(anchor("lognormal", mean=8.0, sigma=sigma))).std() == pytest.approx(sigma, rel=0.06)


def test_bounds():
    uniform = draws(anchor("uniform", low=2.0, high=9.0))
    assert uniform.min() >= 2 and uniform.max() <= 9 and uniform.min() < 2.1 and uniform.max() > 8.9
    pareto = draws(anchor("pareto", mean=6.0, shape=2.0))
    assert pareto.min() >= 3.0 and pareto.max() > 30  # scale = mean·(shape-1)/shape, and a heavy tail
    assert (draws(anchor("lognormal", mean=8.0)) > 0).all()
    assert draws(anchor("lognormal", mean=8.0, sigma=0.0), count=20) == pytest.approx(8.0)
    diurnal = draws(anchor("diurnal", mean=10.0, amplitude=0.5, period=40.0))
    assert diurnal.min() == pytest.approx(5.0) and diurnal.max() == pytest.approx(15.0)


def test_the_pareto_tail_has_its_exponent():
    """P(lag > x) = (scale/x)^shape."""
    found = draws(anchor("pareto", mean=6.0, shape=2.0), count=8000)
    for x in (4.0, 6.0, 12.0):
        p = (3 / x) ** 2
        assert abs((found > x).mean() - p) < 4 * (p * (1 - p) / 8000) ** 0.5


@pytest.mark.parametrize(("p_slow", "p_heal"), [(0.1, 0.3), (0.5, 0.5), (0.02, 0.2)])
def test_a_markov_anchor_is_slow_for_its_stationary_share_and_stays_so(p_slow: float, p_heal: float):
    count = 20_000
    slow = draws(anchor("markov", healthy=3.0, slow=30.0, p_slow=p_slow, p_heal=p_heal), count=count) == 30
    share = p_slow / (p_slow + p_heal)
    correlated = (2 - p_slow - p_heal) / (p_slow + p_heal)  # how many draws count as one
    assert abs(slow.mean() - share) < 4 * (share * (1 - share) * correlated / count) ** 0.5
    lengths = [len(list(group)) for state, group in itertools.groupby(slow) if state]
    assert np.mean(lengths) == pytest.approx(1 / p_heal, rel=0.15)


def test_markov_ends():
    assert (draws(anchor("markov", delay_k=4, p_slow=0.0), count=50) == 4).all()
    assert (draws(anchor("markov", slow=40.0, p_slow=1.0, p_heal=0.0), count=50)[1:] == 40).all()


def test_no_anchor_inside_an_outage_and_the_usual_lag_outside():
    draw = make_draw(anchor("outage", delay_k=6, every=50, length=20), 0)
    for tick in range(1, 300):
        assert draw(tick, tick) == (None if tick % 50 >= 30 else 6)


def test_no_fire_in_an_outage():
    dues = agenda(anchor("outage", lag=4.0, every=50, length=20, cadence=3), 0, TICKS)
    fired = {due.first_tick for due in dues}
    assert fired == {t for t in range(6, TICKS + 1, 3) if t % 50 < 30}


def test_a_diurnal_lag_has_its_period():
    found = draws(anchor("diurnal", mean=10.0, amplitude=0.5, period=40.0), count=400)
    np.testing.assert_allclose(found[40:], found[:-40], rtol=1e-9)
    spectrum = np.abs(np.fft.rfft(found - found.mean()))
    assert spectrum.argmax() == 400 // 40


def test_on_the_wall_clock_a_trace_is_repeated(trace_file: Path):
    draw = make_draw(anchor("trace", path=str(trace_file)), 0)
    assert [draw(i, 0) for i in range(6)] == [4, 1, 8, 4, 1, 8]


def test_a_trace_in_which_nothing_was_merged_has_no_lag_to_give(tmp_path: Path):
    file = tmp_path / "never.csv"
    file.write_text("source_tick,first_tick\n1,\n")
    with pytest.raises(ValueError, match="no correction that was merged"):
        make_draw(anchor("trace", path=str(file)), 0)


# --- the agenda --------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_k", [1, 2, 5, 7, 20])
@pytest.mark.parametrize("cadence", [1, 2, 5, 20])
def test_the_fixed_agenda_is_the_contract_s_schedule(delay_k: int, cadence: int):
    found = agenda(anchor(delay_k=delay_k, cadence=cadence), 0, TICKS)
    ticks = [t for t in range(1, TICKS + 1) if t % cadence == 0 and t >= delay_k]
    assert [(d.source_tick, d.first_tick) for d in found] == [(t - delay_k, t) for t in ticks]


def test_a_constant_lag_of_another_kind_is_the_same_agenda():
    same = dict(delay_k=5, cadence=5)
    fixed = agenda(anchor(**same), 0, TICKS)
    assert agenda(anchor("lognormal", sigma=0.0, **same), 0, TICKS) == fixed
    assert agenda(anchor("diurnal", amplitude=0.0, **same), 0, TICKS) == fixed
    assert agenda(anchor("uniform", low=5.0, high=5.0, **same), 0, TICKS) == fixed


@pytest.mark.parametrize("cadence", [1, 3, 5])
@pytest.mark.parametrize("kind", sorted(set(LAGS) - {"trace"}))
def test_nothing_leads_sources_increase_and_versions_count(kind: str, cadence: int, trace_file: Path):
    config = models(trace_file)[kind].model_copy(update={"cadence": cadence})
    for seed in range(5):
        dues = agenda(config, seed, TICKS)
        assert dues and [d.version for d in dues] == list(range(1, len(dues) + 1))
        assert all(0 <= d.source_tick < d.first_tick <= TICKS and d.first_tick % cadence == 0 for d in dues)
        assert all(a.source_tick < b.source_tick and a.first_tick < b.first_tick for a, b in itertools.pairwise(dues))


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "pareto", "markov", "diurnal"])
def test_the_agenda_is_the_draws_rounded_and_nothing_older_than_what_is_held(kind: str, trace_file: Path):
    config = models(trace_file)[kind].model_copy(update={"cadence": 2})
    draw, newest, expected = make_draw(config, 1), -1, []
    for number, tick in enumerate(range(2, TICKS + 1, 2)):
        source = tick - max(1, round(draw(number, tick)))
        if source > newest:
            newest = source
            expected.append((source, tick))
    assert [(d.source_tick, d.first_tick) for d in agenda(config, 1, TICKS)] == expected


@pytest.mark.parametrize("kind", ["fixed", "uniform", "lognormal", "pareto", "markov", "diurnal"])
@pytest.mark.parametrize("max_lag", [1, 6, 1000])
def test_no_lag_is_beyond_max_lag(kind: str, max_lag: int, trace_file: Path):
    config = models(trace_file)[kind].model_copy(update={"cadence": 2})
    free, kept = (agenda(c, 0, TICKS) for c in (config, config.model_copy(update={"max_lag": max_lag})))
    assert all(d.first_tick - d.source_tick <= max_lag for d in kept)
    if max_lag == 1000:
        assert kept == free


def test_a_shorter_run_has_the_beginning_of_the_agenda_of_a_longer_one():
    config = anchor("lognormal", mean=8.0, cadence=3)
    long = agenda(config, 0, TICKS)
    assert agenda(config, 0, 150) == [d for d in long if d.first_tick <= 150]


@pytest.mark.parametrize("kind", sorted(LAGS))
@pytest.mark.parametrize("end", [1, 8, 61, 150])
def test_a_run_that_may_be_made_longer_starts_every_fire_of_the_longer_one_whose_weights_it_has(
    kind: str, end: int, trace_file: Path
):
    config = models(trace_file)[kind]
    longer = agenda(config, 3, TICKS)
    assert agenda(config, 3, end, beyond=True) == [d for d in longer if d.source_tick < end]
    assert agenda(config, 3, end) == [d for d in longer if (d.first_tick or 0) <= end and d.source_tick < end]


# --- traces ------------------------------------------------------------------------------------


def test_a_trace_is_followed_as_it_is(trace_file: Path):
    expected = [Due(1, 0, 4), Due(2, 3, None), Due(3, 5, 6), Due(4, 6, 14)]
    assert read_trace(str(trace_file)) == expected
    config = anchor("trace", path=str(trace_file), cadence=5, delay_k=9)
    assert agenda(config, 0, 14) == expected
    assert agenda(config, 0, 13) == expected[:3]  # a fire that would be merged after the end is not started


def test_a_csv_says_the_same(tmp_path: Path, trace_file: Path):
    file = tmp_path / "t.csv"
    file.write_text("version,source_tick,first_tick\n1,0,4\n2,3,\n3,5,6\n4,6,14\n")
    assert read_trace(str(file)) == read_trace(str(trace_file))
    file.write_text("first_tick,source_tick\n4,0\n,3\n6,5\n14,6\n")
    assert read_trace(str(file)) == read_trace(str(trace_file))


def test_versions_of_a_trace_may_have_gaps(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("version,source_tick,first_tick\n2,0,4\n5,3,6\n")
    assert read_trace(str(file)) == [Due(2, 0, 4), Due(5, 3, 6)]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("5,5", "nothing may lead"),
        ("6,5", "nothing may lead"),
        ("-1,5", "nothing may lead"),
        ("1,9", "must increase"),  # an older source than the one before
        ("2,9", "must increase"),  # the same one: `delta` could not keep two
        ("3,4", "must increase"),  # merged in the same tick as the one before
        ("3,3.5", "needs source_tick and first_tick"),
        (",7", "needs source_tick and first_tick"),
        ("three,7", "needs source_tick and first_tick"),
    ],
)
def test_a_bad_entry_is_refused_by_its_number(row: str, what: str, tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text(f"source_tick,first_tick\n2,4\n{row}\n8,20\n")
    with pytest.raises(ValueError, match=f"entry 2: .*{what}"):
        read_trace(str(file))


@pytest.mark.parametrize(
    "line",
    ["{}", '{"source_tick": 3}', "[3, 9]", "7", "null", '{"source_tick": 3.5, "first_tick": 9}', '{"source_tick": 3,'],
)
def test_a_bad_line_of_json_is_refused_by_its_number(line: str, tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text(f'{{"source_tick": 2, "first_tick": 4}}\n\n{line}\n')
    with pytest.raises(ValueError, match="entry 2"):
        read_trace(str(file))


def test_versions_that_go_back_are_refused(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("version,source_tick,first_tick\n2,0,4\n2,3,6\n")
    with pytest.raises(ValueError, match="entry 2"):
        read_trace(str(file))


@pytest.mark.parametrize("text", ["", "source_tick,first_tick\n"])
def test_an_empty_trace_is_refused(text: str, tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match="holds no correction"):
        read_trace(str(file))


@pytest.mark.parametrize(
    ("kind", "lag"),
    [
        ("uniform", dict(low=5.0, high=2.0)),
        ("outage", dict(every=10, length=10)),
        ("pareto", dict(shape=1.0)),
        ("markov", dict(p_slow=1.5)),
        ("diurnal", dict(amplitude=1.0)),
        ("trace", dict(path="/no/such/file")),
    ],
)
def test_impossible_models_are_refused(kind: str, lag: dict):
    with pytest.raises(ValidationError):
        anchor(kind, **lag)
