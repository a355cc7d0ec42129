"""Lag models: how late the anchor's corrections are. Seeded, pure, shared by runs and by the simulator.

In lockstep a lag is a number of ticks and exact: `agenda` turns a model into the list of fires of a
run. On the wall clock the same draw slows the real anchor down by that many tick times.
"""

from __future__ import annotations

import csv
import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anchor_service.config import (
    AnchorConfig,
    DiurnalLag,
    FixedLag,
    LagConfig,
    LognormalLag,
    MarkovLag,
    OutageLag,
    ParetoLag,
    TraceLag,
    UniformLag,
)

BEYOND = 10_000  # no lag that matters is longer: so far after its end a run looks for fires that start within it
Draw = Callable[[int, int], float | None]  # (number of the fire, tick) -> lag in ticks; None: no anchor now
Maker = Callable[[LagConfig, int, int], Draw]  # (config, delay_k, seed)
L = TypeVar("L", bound=LagConfig)


@dataclass(frozen=True)
class Due:
    """One fire: M of θ_source on b_{source+1}, first merged in `first_tick`; None if it never was merged."""

    version: int
    source_tick: int
    first_tick: int | None


def _rng(seed: int, fire: int) -> np.random.Generator:
    """Each fire has its own numbers, so a lag depends on nothing that happened before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x1A6, fire])))


def _fixed(config: FixedLag, delay_k: int, seed: int) -> Draw:
    return lambda fire, tick: delay_k


def _uniform(config: UniformLag, delay_k: int, seed: int) -> Draw:
    return lambda fire, tick: _rng(seed, fire).uniform(config.low, config.high)


def _lognormal(config: LognormalLag, delay_k: int, seed: int) -> Draw:
    mean = config.mean or delay_k
    mu = math.log(mean) - config.sigma**2 / 2  # so that the mean, not the median, is what was asked for
    return lambda fire, tick: _rng(seed, fire).lognormal(mu, config.sigma)


def _pareto(config: ParetoLag, delay_k: int, seed: int) -> Draw:
    mean = config.mean or delay_k
    scale = mean * (config.shape - 1) / config.shape
    return lambda fire, tick: scale * (1 + _rng(seed, fire).pareto(config.shape))


def _markov(config: MarkovLag, delay_k: int, seed: int) -> Draw:
    """Two states; the state at fire i is found by walking from fire 0, and remembered."""
    states = [False]

    def slow(fire: int) -> bool:
        while len(states) <= fire:
            u = _rng(seed, len(states)).random()
            states.append(u >= config.p_heal if states[-1] else u < config.p_slow)
        return states[fire]

    return lambda fire, tick: config.slow if slow(fire) else (config.healthy or delay_k)


def _outage(config: OutageLag, delay_k: int, seed: int) -> Draw:
    """No anchor in the last `length` ticks of each `every`."""
    return lambda fire, tick: None if tick % config.every >= config.every - config.length else (config.lag or delay_k)


def _diurnal(config: DiurnalLag, delay_k: int, seed: int) -> Draw:
    mean = config.mean or delay_k
    return lambda fire, tick: mean * (1 + config.amplitude * math.sin(2 * math.pi * tick / config.period))


def _trace(config: TraceLag, delay_k: int, seed: int) -> Draw:
    """For the wall clock: the lags of the trace, over and over."""
    lags = [due.first_tick - due.source_tick for due in read_trace(config.path) if due.first_tick is not None]
    if not lags:
        raise ValueError(f"{config.path} holds no correction that was merged: there is no lag to take from it")
    return lambda fire, tick: lags[fire % len(lags)]


def _of(section: type[L], make: Callable[[L, int, int], Draw]) -> Maker:
    def checked(config: LagConfig, delay_k: int, seed: int) -> Draw:
        if not isinstance(config, section):
            raise TypeError(f"a {section.__name__} is needed, this is a {type(config).__name__}")
        return make(config, delay_k, seed)

    return checked


LAGS: dict[str, Maker] = {
    "fixed": _of(FixedLag, _fixed),
    "uniform": _of(UniformLag, _uniform),
    "lognormal": _of(LognormalLag, _lognormal),
    "pareto": _of(ParetoLag, _pareto),
    "markov": _of(MarkovLag, _markov),
    "outage": _of(OutageLag, _outage),
    "diurnal": _of(DiurnalLag, _diurnal),
    "trace": _of(TraceLag, _trace),
}


def make_draw(config: AnchorConfig, seed: int) -> Draw:
    return LAGS[config.lag.kind](config.lag, config.delay_k, seed)


def agenda(config: AnchorConfig, seed: int, last_tick: int, beyond: bool = False) -> list[Due]:
    """Every fire of a lockstep run of `last_tick` ticks, in the order of versions.

    A fire may happen in each tick that the cadence allows. It merges the weights that are its lag
    old, rounded to whole ticks and at least 1; nothing happens where those weights do not exist yet,
    where they are no newer than the last fire's, or where the lag is beyond `max_lag`. A trace is
    followed as it is. `beyond`: with the fires that start within the run and are due after its end,
    which a run that is made longer will merge.
    """
    dues = _dues(config, seed, last_tick + (BEYOND if beyond else 0))
    return [
        due
        for due in takewhile(lambda due: due.source_tick < last_tick, dues)
        if beyond or due.first_tick is None or due.first_tick <= last_tick
    ]


def _dues(config: AnchorConfig, seed: int, last: int) -> Iterator[Due]:
    """Fires due in the ticks up to `last`; of a trace all. Their sources increase."""
    if config.lag.kind == "trace":
        yield from read_trace(config.lag.path)
        return
    draw, newest, version = make_draw(config, seed), -1, 0
    for number, tick in enumerate(range(config.cadence, last + 1, config.cadence)):
        lag = draw(number, tick)
        source = -1 if lag is None else tick - max(1, round(lag))
        if source <= newest or (config.max_lag and tick - source > config.max_lag):
            continue
        newest, version = source, version + 1
        yield Due(version, source, tick)


def read_trace(path: str) -> list[Due]:
    """A run's corrections.jsonl, or a CSV with the columns source_tick and first_tick (empty: never merged).

    Raises ValueError, naming the entry, if a correction would lead, or if ticks do not increase.
    """
    file = Path(path).expanduser()
    text = file.read_text()
    if file.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
    else:
        rows = [line for line in text.splitlines() if line.strip()]
    dues: list[Due] = []
    last_first = 0
    for number, row in enumerate(rows, start=1):
        try:
            row = json.loads(row) if isinstance(row, str) else row
            source, first = _whole(row["source_tick"]), row["first_tick"]
            first = None if first in (None, "") else _whole(first)
            version = _whole(row.get("version") or number)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, entry {number}: needs source_tick and first_tick ({error})") from None
        if source < 0 or (first is not None and first <= source):
            raise ValueError(f"{path}, entry {number}: source_tick {source} and first_tick {first}: nothing may lead")
        stalled = dues and (source <= dues[-1].source_tick or version <= dues[-1].version)
        if stalled or (first is not None and first <= last_first):
            raise ValueError(f"{path}, entry {number}: ticks must increase from one correction to the next")
        dues.append(Due(version, source, first))
        last_first = first or last_first
    if not dues:
        raise ValueError(f"{path} holds no correction")
    return dues


def _whole(value: str | int) -> int:
    """A whole number of a CSV cell or of JSON; 2.5 is none. Raises ValueError or TypeError."""
    return int(value) if isinstance(value, str) else operator.index(value)
