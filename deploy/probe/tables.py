"""A probe as a table, and what it means in words."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from deploy.estimate.worth import Worth, prediction_in_words
from deploy.probe.codec_trial import DRAWS
from deploy.probe.probe import Probe
from deploy.probe.scores import Score
from rl.mismatch import COMFORT, OUTSIDE

LOST = 0.35  # nats a token: above it the clip is everywhere


def show_probe(found: Probe, console: Console) -> None:
    console.print(scores_table(found))
    console.print(gradients_table(found))
    console.print(definitions(found), highlight=False)
    for line in advice(found):
        console.print(line)
    if found.worth:
        console.print(agreements_table(found.worth))
    console.print(worth_line(found), highlight=False)


def scores_table(found: Probe) -> Table:
    """Fits 80 columns; what it leaves out is in --json."""
    table = Table(
        title="codecs against none at equal weights", title_justify="left", title_style="bold", box=SIMPLE, padding=0
    )
    table.add_column("codec", no_wrap=True)
    for column in ("rate", "KL", *(f">{f}" for f in OUTSIDE), "FVU", "cos dX", "cos g"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in found.scores:
        if s.boundaries != found.config.swarm.boundaries:
            continue
        cells = [f"{s.total_rate:.1%}", f"{abs(s.kl):.2g}", *(f"{share:.1%}" for share in s.outside.values())]
        cells += [f"{s.fvu:.2g}", f"{s.dx_cosine:.3f}", f"{s.gradient_cosine:.3f}"]
        table.add_row(_short(s), *cells, style="bold" if s.own else None)
    return table


def gradients_table(found: Probe) -> Table:
    """Bias and variance of the gradient apart, by codec and number of boundaries; fits 80 columns."""
    table = Table(
        title="bytes, policy and gradient by number of boundaries",
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("codec", no_wrap=True)
    for column in ("cuts", "bytes", "KL", "cos g", "bias", "below", "variance"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in found.scores:
        cells = [f"{len(s.boundaries)}", f"{s.token_bytes:,.0f}", f"{abs(s.kl):.2g}", f"{s.gradient_cosine:.3f}"]
        cells += [f"{s.gradient_bias:.3g}", f"{s.gradient_bias_bound:.3g}"]
        cells.append(f"{s.gradient_variance:.3g}" if s.draws > 1 else "")
        table.add_row(_short(s), *cells, style="bold" if s.own else None)
    return table


def _short(s: Score) -> str:
    name = s.name.removeprefix("transform ").replace(" / ", "/")
    return f"{name} *" if s.own else name


def definitions(found: Probe) -> str:
    config = found.config
    drawn = " No answer was better than another, so advantages were drawn at random." if found.drawn_advantages else ""
    return (
        f"{config.model.path} on {config.task.name}, boundaries {config.swarm.boundaries}: {found.tokens:,} response "
        f"tokens of the validation split scored at temperature {config.rollout.temperature:g}, gradients on "
        f"{found.gradient_tokens:,} of them; codecs calibrated on {found.calibration_tokens:,} of the training split."
        f"{drawn} * configured. KL(without ‖ with codec) in nats a token, over the whole vocabulary. >f: tokens whose "
        f"probability changes by more than a factor f. FVU and cos dX at the worst boundary; g is the gradient of the weights below "
        f"layer {found.lowest}, both directions compressed. Of codecs that draw random numbers it was taken with "
        f"{DRAWS} draws: bias is how far their mean is from the dense gradient, below two standard errors more, variance the "
        f"mean squared deviation of one draw from that mean, all in norms of the dense gradient. Bytes: a token's in a tick, at "
        f"all boundaries. Rates are all bytes over dense bytes (of bf16 for the transform, else of the model's dtype), a tick's "
        f"forwards and backward together; side: statistics, bases and tables, spread over the tokens of the run, and "
        f"part of the total rate alone."
    )


def advice(found: Probe) -> list[str]:
    """What to expect of the configured codec, and the cheapest that keeps the policy."""
    lines = [_expect(s) for s in found.scores if s.own and s.compresses]
    here = found.config.swarm.boundaries
    kept = [s for s in found.scores if s.compresses and s.kl <= COMFORT and s.boundaries == here]
    cheapest = min(kept, key=lambda s: s.total_rate, default=None)
    if cheapest is None:
        lines.append(
            f"No codec that was compared keeps the policy (KL at most {COMFORT:g}): raise the rate, "
            f"or move the boundary with swarm.boundaries."
        )
    elif cheapest.own:
        lines.append(f"It is the cheapest of those compared that keeps the policy (KL at most {COMFORT:g}).")
    else:
        lines.append(
            f"Cheapest of those compared that keeps the policy (KL at most {COMFORT:g}): {cheapest.name}, "
            f"total rate {cheapest.total_rate:.4f}, KL {cheapest.kl:.3g}, gradient cosine {cheapest.gradient_cosine:.3f}."
        )
    return lines


def agreements_table(worth: Worth) -> Table:
    """What a merger of the kind `calibrated` would see."""
    m, anchor = worth.measured, worth.config.anchor
    title = f"an anchor at K={anchor.delay_k}/{anchor.cadence}: {m.batches} mini-batches of {m.samples} answers"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    table.add_column("", no_wrap=True)
    for column in ("value", "error", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    chance = f"±{m.chance:.4f}"
    table.add_row("f  signs of M and of G_comp of the same answers", f"{m.f:.4f}", f"{m.f_error:.4f}", chance)
    table.add_row("a  signs of M and of another M", f"{m.a:.4f}", f"{m.a_error:.4f}", chance)
    table.add_row("τ  ticks for which a sign is felt", f"{worth.tau:.3g}", "", "")
    return table


def worth_line(found: Probe) -> str:
    """Of the anchor, or why nothing can be said of it."""
    if found.worth:
        return prediction_in_words(found.worth)
    why = "gradients are noise" if found.drawn_advantages else "too few mini-batches have a gradient: more --tokens"
    return f"Whether an anchor is worth its bytes cannot be said: {why}."


def _expect(s: Score) -> str:
    clipped, far = s.outside["1.2"], s.outside["5"]
    start = f"Configured, {s.name}: KL {s.kl:.3g} nats a token, gradient cosine {s.gradient_cosine:.3f}."
    if s.kl <= COMFORT:
        return f"{start} On-policy enough for ratio clipping with recomputed log-probs (grpo.old_logprobs=trainer)."
    if s.kl <= LOST:
        return (
            f"{start} The trainer's policy is not the one that samples: {clipped:.0%} of the tokens leave [1/1.2, 1.2] "
            f"before any weight has changed. Recompute log-probs (grpo.old_logprobs=trainer), bound bad tokens with "
            f"grpo.clip_ratio_c=3, and expect the gradient to be off by what its cosine says; better, raise the rate."
        )
    return (
        f"{start} Another policy is being trained: {clipped:.0%} of the tokens leave [1/1.2, 1.2], {far:.0%} a factor "
        f"of 5. With the engine's log-probs expect clipping everywhere; recomputed ones hide it, for the gradient is "
        f"still the other policy's. Raise the rate; codec.max_kl stops such a run at its second step."
    )
