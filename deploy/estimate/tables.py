"""A plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from anchor_service.config import correction_payload
from codec.ledger import ANCHOR, CHANNELS, PUBLISHED
from deploy.estimate.bytes import full, weights_walk
from deploy.estimate.cadences import Cadence
from deploy.estimate.memory import peak
from deploy.estimate.parameters import Params
from deploy.estimate.plan import Plan, human_bytes, mb
from deploy.estimate.workload import prompt_tokens, response_tokens, samples_per_tick, tokens_per_tick
from deploy.estimate.worth import prediction_in_words
from merger import merger_class
from swarm.run_config import RunConfig

_TEXT = {"channel", "M as", "role", "part", "", "phase"}


def show_plan(plan: Plan, console: Console) -> None:
    console.print(headline(plan))
    console.print(bytes_table(plan))
    console.print(ratios(plan))
    tables = [schemes_table(plan), memory_table(plan), time_table(plan), anchor_table(plan)]
    for table in filter(None, tables):
        console.print(table)
    if plan.worth:
        console.print(prediction_in_words(plan.worth), highlight=False)
    for warning in plan.warnings:
        console.print(f"[bold yellow]warning[/] {warning}")
    if not plan.warnings:
        console.print("no warnings")
    console.print(assumptions(plan), highlight=False)


def headline(plan: Plan) -> str:
    c, p = plan.config, plan.params
    anchor = f"anchor K={c.anchor.delay_k}/{c.anchor.cadence}" if c.anchor.enabled else "no anchor"
    return (
        f"[bold]{c.run.name}[/]: {c.model.path}, {p.total:,} parameters{', tied' if p.tied else ''}{f' in adapters beside {p.beneath.total:,}' if p.beneath else ''}; "
        f"dp={c.swarm.dp} pp={c.swarm.pp}, codec {c.codec.kind}, {anchor}, merger {c.merger.kind}"
    )


def bytes_table(plan: Plan) -> Table:
    each, channels = plan.config.grpo.ticks_per_step, plan.configured.channels
    columns = ("sent/tick", "dense/tick", "sent/step", "dense/step", "share")
    table = _table("MB on all links, a mean tick and a step", "channel", *columns)
    total = tuple(sum(way) for way in zip(*channels.values()))
    for channel in CHANNELS:
        sent, dense = channels[channel]
        table.add_row(channel, *_mbs(sent, dense, sent * each, dense * each), f"{sent / (total[0] or 1):.1%}")
    table.add_row("[bold]all[/]", *_mbs(*total, *(each * t for t in total)))
    return table


def ratios(plan: Plan) -> str:
    s = plan.configured
    return (
        f"comm/total_ratio [bold]{_ratio(s.total_ratio)}[/] (everything), "
        f"comm/bytes_ratio [bold]{_ratio(s.bytes_ratio)}[/] (published: boundary and Q alone)"
    )


def schemes_table(plan: Plan) -> Table:
    columns = ("boundary", "snapshot", "M", "bytes", "circuit", "total")
    table = _table("ways to send M: MB a tick, and ratios", "cadence", "M as", *columns)
    for s in plan.schemes:
        sent = _mbs(s.sent(*PUBLISHED), s.sent("snapshot"), s.sent("correction"))
        table.add_row(f"{s.cadence}", s.name, *sent, *map(_ratio, (s.bytes_ratio, s.circuit_ratio, s.total_ratio)))
    return table


def memory_table(plan: Plan) -> Table:
    table = _table("memory of one process of each role", "role", "part", "device", "host")
    for role in dict.fromkeys(part.role for part in plan.parts):
        mine = [part for part in plan.parts if part.role == role]
        peaks = [f"[bold]{human_bytes(peak(plan.parts, role, where))}[/]" for where in ("device", "host")]
        table.add_row(f"[bold]{role}[/]", "[bold]peak[/]", *peaks)
        for part in mine:
            cells = ("", human_bytes(part.bytes)) if part.where == "host" else (human_bytes(part.bytes), "")
            notes = ["rough"] * part.rough + [part.during] * (part.during != "always")
            table.add_row("", part.name + (f" ({', '.join(notes)})" if notes else ""), *cells)
    return table


def time_table(plan: Plan) -> Table:
    table = _table("time, from `links`", "", "phase", "seconds", "share")
    for name, phases in (("tick", plan.tick), ("step", plan.step)):
        for phase, seconds in vars(phases).items():
            table.add_row(name, phase, f"{seconds:,.2f}", f"{seconds / phases.total:.0%}")
        table.add_row(f"[bold]{name}[/]", "[bold]all[/]", f"[bold]{phases.total:,.2f}[/]", "")
    return table


def anchor_table(plan: Plan) -> Table | None:
    if plan.anchor is None:
        return None
    a, config = plan.anchor, plan.config.anchor
    table = _table(f"the anchor, {config.workers} worker(s)", "", "value")
    for phase, seconds in vars(a.fire).items():
        table.add_row(f"fire: {phase}", f"{seconds:,.2f} s")
    table.add_row("fire: all", f"{a.fire.total:,.2f} s")
    table.add_row("a tick with its share of the step", f"{a.tick_s:,.2f} s")
    given = [f"configured {config.cadence}", f"configured {config.delay_k}"]
    cadence, delay_k = given if config.clock == "lockstep" else ["wall clock: as it comes"] * 2
    table.add_row("smallest sustainable cadence", f"[bold]{a.cadence}[/] ({cadence})")
    table.add_row("delay K, ticks of lag at the first merge", f"[bold]{a.delay_k}[/] ({delay_k})")
    for asked in a.affordable.asked:
        table.add_row(f"cadence {asked.cadence} takes", _takes(asked))
    best = a.affordable.best
    table.add_row(
        f"best within {mb(a.affordable.budget)} a tick",
        f"[bold]cadence {best.cadence}, replay {best.replay}[/]: {_takes(best)}",
    )
    return table


def _takes(c: Cadence) -> str:
    if c.workers is None:
        return f"no number of workers, M̄ takes longer from one to the next; {mb(c.bytes)} a tick"
    handed = f", and {human_bytes(c.m_bar_bytes)} of M̄ among them" if c.m_bar_bytes else ""
    return f"{c.workers} worker(s), {mb(c.bytes)} a tick{handed}"


def assumptions(plan: Plan) -> str:
    c = plan.config
    lengths = f"{prompt_tokens(c):g} + {response_tokens(c):g} tokens"
    deltas = "" if full(c) else f" {_deltas(c, plan.params)}"
    circuit = f"The circuit ratio is {', '.join((*PUBLISHED, *ANCHOR))} over the dense boundary."
    return (
        f"Assumed: prompt + response of {lengths}, {samples_per_tick(c)} samples and {tokens_per_tick(c):,.0f} tokens "
        f"a tick.{deltas}{_unmerged(c)} {circuit} The task itself was not checked."
    )


def _unmerged(config: RunConfig) -> str:
    """What a run may send less."""
    if not merger_class(config.merger.kind).looks or correction_payload(config.anchor, config.merger) is None:
        return ""
    return f" Corrections are an upper bound: merger {config.merger.kind} does not fetch those that it gives no share."


def _deltas(config: RunConfig, params: Params) -> str:
    if weights_walk(config, params, config.ticks).own:
        return "Weight deltas were measured on a sample of the model's weights, moved by Adam on noise."
    return "Sizes of weight deltas are an estimate: the model's weights are not on this machine, normal ones stood in."


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXT else "right")
    return table


def _mbs(*sizes: float) -> list[str]:
    return [f"{n / 1e6:,.3f}" for n in sizes]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
