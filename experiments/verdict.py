"""What a sweep says, in words.

Failures and differences that cannot be told from nothing come first: a "no" is a result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from experiments.anchor_worth import worth_in_words
from experiments.cells import Cell, Findings
from experiments.frontier import frontier_in_words
from experiments.stats import Effects, Estimate, above_floor, factorial, near_base, paired
from experiments.sweep import Gates, flat
from experiments.words import Number, Sentence, cell_in_words, interval, place, plain

TUNED = "each at its best"
NAMED = 3  # pairs that have no runs: of a part of a large sweep they are most


class Difference(NamedTuple):
    """One comparison at one place, as a row of a table."""

    a: Cell
    b: Cell
    where: str
    found: Estimate


def verdict(findings: Findings) -> list[Sentence]:
    """All sentences, those about what is missing, failed or not distinguishable first."""
    found = [*_missing(findings), *worth_in_words(findings), *frontier_in_words(findings)]
    found += [*_compared(findings), *_gates(findings)]
    found += [s for point in findings.sweep.points() for s in _square(findings, point)]
    return sorted(
        found + _ignitions(findings) + _edges(findings) + _extended(findings), key=lambda sentence: sentence.good
    )


def _missing(findings: Findings) -> list[Sentence]:
    short = [cell for cell in findings.cells if cell.stopped]
    absent = sum(cell.absent for cell in findings.cells)
    if not short and not absent:
        return []
    parts: list[str | Number] = ["Not every run has completed, and only completed ones count: "]
    for cell in short:
        parts += [f"{cell.name} ", Number(cell.stopped, cell.name), "; "]
    parts += [f"{absent} not run", "; "] if absent else []
    return [Sentence((*parts[:-1], "."), False)]


# --- comparisons -----------------------------------------------------------------------------------


def differences(findings: Findings) -> list[Difference]:
    """Every pair that the sweep compares: at each point of the grid, and each arm at its best one."""
    found = []
    for a, b in findings.sweep.compare:
        for point in [] if findings.sweep.tuning else findings.sweep.points():
            cells = findings.at(point)
            found.append(Difference(cells[a], cells[b], place(point), paired(cells[a].values, cells[b].values)))
        if findings.sweep.grid:
            cells = findings.tuned
            found.append(Difference(cells[a], cells[b], TUNED, paired(cells[a].values, cells[b].values)))
    return found


def _compared(findings: Findings) -> list[Sentence]:
    """With a grid, only where both are tuned."""
    found = [d for d in differences(findings) if not findings.sweep.grid or d.where == TUNED]
    absent = [f"{cell_in_words(d.a)} with {cell_in_words(d.b)}" for d in found if not d.found.n]
    named = ", ".join(absent[:NAMED]) + (f", and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
    without = Sentence((f"No seed has completed in both, so not compared: {named}.",), False)
    return [without] * bool(absent) + [_difference(d) for d in found if d.found.n]


def _difference(d: Difference) -> Sentence:
    names = (
        f"{cell_in_words(d.a)} (",
        Number(plain(d.a.mean), d.a.name),
        f") and {cell_in_words(d.b)} (",
        Number(plain(d.b.mean), d.b.name),
    )
    number = Number(interval(d.found), d.a.name)
    if not d.found.distinguishable:
        return Sentence((*names, ") are not distinguishable: ", number, _over(d.found)), False)
    better = d.found.mean > 0
    word = "better" if better else "worse"
    parts = (*names[:2], f") is {word} than {cell_in_words(d.b)} (", names[3], ") by ", number, _over(d.found))
    return Sentence(parts, better)


def _over(found: Estimate) -> str:
    return f" over {found.n} seed{'s' * (found.n != 1)}."


# --- gates -----------------------------------------------------------------------------------------


def _gates(findings: Findings) -> list[Sentence]:
    gates, cells = findings.sweep.gates, findings.tuned
    base, floor = (cells[arm] if arm in cells else None for arm in (gates.base, gates.floor))
    judged = [cell for arm, cell in cells.items() if arm not in (gates.base, gates.floor) and cell.values]
    return [s for cell in judged for s in [_gate(cell, base, floor, gates)] if s]


def _gate(cell: Cell, base: Cell | None, floor: Cell | None, gates: Gates) -> Sentence | None:
    said: list[list[str | Number]] = []
    good = True
    if base and (gate := near_base(base.values_at(gates.step), cell.values_at(gates.step), gates.drop)).found.n:
        number = Number(interval(gate.found), cell.name)
        at = f" at step {gates.step}" if gates.step else ""
        words = (
            f"remains near {cell_in_words(base)}: drop "
            if gate.passed
            else f"fails the {gates.drop:g} gate by a drop of "
        )
        against = f"{at} (gate {gates.drop:g})" if gate.passed else f" against {cell_in_words(base)}{at}"
        said.append([words, number, against + ("" if gate.certain else ", not certain over these seeds")])
        good = gate.passed and gate.certain
    elif base and gates.step and paired(cell.values, base.values).n:
        said.append([f"is not judged beside {cell_in_words(base)}: no validation at step {gates.step}"])
        good = False
    if floor and (gate := above_floor(cell.values, floor.values)).found.n:
        number = Number(interval(paired(cell.values, floor.values)), cell.name)
        doubt = "" if gate.found.distinguishable else ", not distinguishable from it"
        said.append([f"ends {'above' if gate.passed else 'below'} the floor (", number, f"){doubt}"])
        good = good and gate.passed and gate.found.distinguishable
    if not said:
        return None
    parts: list[str | Number] = [f"{cell_in_words(cell)} (", Number(plain(cell.mean), cell.name), ") "]
    return Sentence((*parts, *said[0], *(part for more in said[1:] for part in [" and ", *more]), "."), good)


# --- the 2x2 ---------------------------------------------------------------------------------------


class Square(NamedTuple):
    """The 2x2 at one point of the grid. `factors` say what is raised, as `anchor.delay_k 5 → 20`."""

    cells: tuple[Cell, ...]
    factors: tuple[str, str]
    effects: Effects
    second_minus_first: Estimate  # of the two main effects: which does more


def square(findings: Findings, point: dict[str, Any]) -> Square | None:
    """None if the sweep names no four cells."""
    if not findings.sweep.two_by_two:
        return None
    cells = tuple(findings.at(point)[arm] for arm in findings.sweep.two_by_two)
    neither, first, second, _ = cells
    factors = _raised(neither, first), _raised(neither, second)
    common = set.intersection(*(set(cell.values) for cell in cells))
    values = [{seed: value for seed, value in cell.values.items() if seed in common} for cell in cells]
    return Square(cells, factors, factorial(*values), paired(values[2], values[1]))


def _raised(low: Cell, high: Cell) -> str:
    if not low.runs or not high.runs:
        return f"from {low.arm} to {high.arm}"
    before, after = flat(low.runs[0].settings), flat(high.runs[0].settings)
    keys = [k for k in after if before.get(k) != after[k] and k not in ("run.name", "run.seed")]
    return ", ".join(f"{key} {before.get(key)} → {after[key]}" for key in keys)


def _square(findings: Findings, point: dict[str, Any]) -> list[Sentence]:
    found = square(findings, point)
    if found is None or not found.effects.interaction.n:
        return []
    at = f"At {place(point)}: " if point else ""
    _, first, second, both = (cell.name for cell in found.cells)
    effects, factors, more = found.effects, found.factors, found.second_minus_first
    sentences = [
        _contrast(effects.first, first, f"{at}{factors[0]} changes accuracy by ", f"{at}the effect of {factors[0]}"),
        _contrast(effects.second, second, f"{at}{factors[1]} changes accuracy by ", f"{at}the effect of {factors[1]}"),
        _contrast(
            effects.interaction, both, f"{at}Both together differ from the sum of the two by ", f"{at}an interaction"
        ),
    ]
    worse = factors if more.mean > 0 else factors[::-1]
    if more.distinguishable:
        number = Number(f"{abs(more.mean):.3f} ± {more.half:.3f}", second)
        parts = (f"{at}{worse[0]} does more damage than {worse[1]}, by ", number, _over(more))
        return [*sentences, Sentence(parts, True)]
    return [*sentences, _contrast(more, second, "", f"{at}which of the two does more damage")]


def _contrast(found: Estimate, cell: str, finding: str, subject: str) -> Sentence:
    number = Number(interval(found), cell)
    if found.distinguishable:
        return Sentence((finding, number, _over(found)), True)
    subject = subject[0].upper() + subject[1:]
    return Sentence((f"{subject} is not distinguishable: ", number, _over(found)), False)


# --- ignition and the grid -------------------------------------------------------------------------


def ignited(cell: Cell) -> str:
    """`length 41 (2 of 3), entropy 44 (2 of 3); length led 2`: first steps of all runs; a dash if none ignited."""
    found = list(cell.ignitions.values())
    parts = []
    for what in ("length", "entropy"):
        steps = [step for i in found if (step := getattr(i, what)) is not None]
        if steps:
            parts.append(f"{what} {min(steps):g} ({len(steps)} of {len(found)})")
    led = [i.led for i in found if i.led]
    leads = ", ".join(f"{who} {'led ' if who != 'together' else ''}{led.count(who)}" for who in dict.fromkeys(led))
    return f"{', '.join(parts)}; {leads}" if parts else "–"


def _ignitions(findings: Findings) -> list[Sentence]:
    cells = [cell for cell in findings.tuned.values() if ignited(cell) != "–"]
    if not cells:
        return []
    parts: list[str | Number] = ["Response length or entropy left its baseline for good, first at step: "]
    for cell in cells:
        parts += [f"{cell_in_words(cell)} ", Number(ignited(cell), cell.name), "; "]
    return [Sentence((*parts[:-1], "."), False)]


def _edges(findings: Findings) -> list[Sentence]:
    cells = [cell for cell in findings.tuned.values() if cell.values and findings.at_the_edge(cell)]
    if not cells:
        return []
    far = ", also after its extension" if findings.sweep.extend else ""
    parts: list[str | Number] = [f"At their best at an end of the grid{far}, so that better values may lie outside: "]
    for cell in cells:
        parts += [f"{cell.arm} ", Number(place(cell.point), cell.name), "; "]
    return [Sentence((*parts[:-1], "."), False)]


def _extended(findings: Findings) -> list[Sentence]:
    parts: list[str | Number] = []
    for arm, cells in findings.extended.items():
        best, ran = findings.tuned[arm], [cell for cell in cells if cell.runs]
        if ran:
            parts += [f"{arm} to {place(ran[-1].point)}, best at ", Number(place(best.point), best.name), "; "]
    first = "Given points beyond the grid, as their best was at its end: "
    return [Sentence((first, *parts[:-1], "."), True)] * bool(parts)
