"""`northstar probe` against plain code, sample by sample, and against what must hold of any codec."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from anchor_service.dense_gradient import DenseGradient, DenseSetup
from anchor_service.diagnosis import cosine
from codec.config import CodecConfig
from codec.costs import BoundaryShape, Tokens, codec_cost
from deploy.cli import app
from deploy.config import ConfigError, load
from deploy.estimate.plan import make_plan
from deploy.estimate.worth import Measured, Worth
from deploy.probe import codec_trial
from deploy.probe.anchor_trial import Gradients
from deploy.probe.codec_trial import DRAWS, Halves, Head, Trial
from deploy.probe.probe import Probe, calibrate, compared_with, numbers_of_boundaries, probe, score, sets_of_boundaries
from deploy.probe.scores import gradient_error
from deploy.probe.tables import advice
from rl.aggregation import weighted
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.objective import loss_terms, microbatches
from rl.spans import spans
from swarm.run_config import RunConfig
from tests.conftest import make_batch

CUTS = [1, 3]
SMALL = ("swarm.micro_batch_size=16", "rollout.batch_size=4")


def ignore(line: str) -> None: ...


# --- plain code --------------------------------------------------------------------------------


class Projected(torch.autograd.Function):
    """X̂ = (XQ)Qᵀ and dX̂ = (dX Q)Qᵀ, as the design has it; keeps what went in and what came out."""

    @staticmethod
    def forward(ctx, x, q, seen):
        ctx.save_for_backward(q)
        ctx.seen = seen
        out = x @ q @ q.T
        seen["x"].append((x[0], out[0]))
        return out

    @staticmethod
    def backward(ctx, dx):
        (q,) = ctx.saved_tensors
        out = dx @ q @ q.T
        ctx.seen["dx"].append((dx[0], out[0]))
        return out, None, None


@dataclass
class Plain:
    """Log-probs [R, V] over all responses, the gradient of the first layers by name, and what crossed each boundary."""

    logp: torch.Tensor
    grad: dict[str, torch.Tensor]
    seen: dict[int, dict[str, list]]


def plain_run(folder: Path, batch: Batch, bases: dict[int, torch.Tensor]) -> Plain:
    """Sample by sample, no padding; with an empty `bases` without codec."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[int, dict[str, list]] = {layer: {"x": [], "dx": []} for layer in bases}
    for layer, q in bases.items():
        model.model.layers[layer].register_forward_pre_hook(
            lambda _, args, q=q, s=seen[layer]: (Projected.apply(args[0], q, s), *args[1:])
        )
    token_at, response_at, found = np.cumsum([0, *batch.total]), np.cumsum([0, *batch.response_lengths]), []
    loss = torch.zeros(())
    for i in range(len(batch)):
        ids = torch.from_numpy(batch.tokens[token_at[i] : token_at[i + 1]].astype(np.int64))
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)[batch.prompt[i] - 1 : -1]
        new = logp.gather(1, ids[batch.prompt[i] :, None]).squeeze(1)
        old = torch.from_numpy(batch.rollout_logprobs[response_at[i] : response_at[i + 1]].copy())
        ratio, advantage = torch.exp(new - old), float(batch.advantages[i])
        loss = loss - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / batch.response_tokens
        found.append(logp.detach())
    loss.backward()
    below = ("model.embed_tokens.", *(f"model.layers.{i}." for i in range(CUTS[0])))
    grad = {n: p.grad for n, p in model.named_parameters() if n.startswith(below)}
    return Plain(torch.cat(found), grad, seen)


def trial_of(folder: Path, config: RunConfig, batch: Batch, rank: int) -> tuple[Trial, torch.Tensor]:
    halves = Halves(folder, 4, CUTS, torch.float32, torch.device("cpu"))
    trial = Trial(CodecConfig(kind="powersgd", rank=rank), halves, seed=3)
    calibrate(halves, [trial], make_batch(seed=1), config, ignore)
    reference, _ = score(halves, [trial], batch, config, ignore)
    return trial, reference


def test_every_number_is_that_of_plain_code(untied_model: Path):
    """Of tied models the head would add to the embedding's gradient, which the lower half does not hold."""
    config = load("k5", [f"model.path={untied_model}", "swarm.boundaries=[1, 3]", "grpo.old_logprobs=rollout"])
    batch = make_batch()
    trial, reference = trial_of(untied_model, config, batch, rank=12)
    bases = {layer: b.forward.basis.q for layer, b in trial.boundaries.items()}
    dense, lossy = plain_run(untied_model, batch, {}), plain_run(untied_model, batch, bases)

    exact = (dense.logp.exp() * (dense.logp - lossy.logp)).sum().item()
    assert exact / batch.response_tokens > 0.01  # the codec does something here
    assert trial.sums["kl"] == pytest.approx(exact, rel=1e-4)
    for layer, seen in lossy.seen.items():
        x = torch.cat([x[1:] for x, _ in seen["x"]])  # without first tokens
        error = torch.cat([(x - out)[1:] for x, out in seen["x"]]).square().sum()
        assert _fvu(trial, layer) == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-3)
        dx, out = (torch.cat([pair[i] for pair in seen["dx"]]).flatten() for i in range(2))
        assert trial.boundaries[layer].seen["bwd"].cosine("c")["c"] == pytest.approx(cosine(dx, out), rel=1e-3)
    ours, plain = cosine(trial.gradients[0], reference), cosine(*(_flat(run.grad) for run in (lossy, dense)))
    assert ours == pytest.approx(plain, rel=1e-3) and ours < 0.99


def _fvu(trial: Trial, layer: int) -> float:
    return trial.boundaries[layer].seen["fwd"].fvu("f")["f"]


def _flat(grad: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad[name].flatten() for name in sorted(grad)])


def test_gradients_of_the_whole_model_are_those_of_plain_code_and_of_the_anchor(untied_model: Path):
    """Through the codec those below the first boundary; without it all of them, to the bit what an anchor computes."""
    config = load("k5", [f"model.path={untied_model}", "swarm.boundaries=[1, 3]", "grpo.old_logprobs=rollout"])
    batch = make_batch()
    trial, _ = trial_of(untied_model, config, batch, rank=12)
    gradients = Gradients(untied_model, 4, config)
    anchor = DenseGradient.beside(
        DenseSetup(config.anchor, config.model, config.grpo, config.snapshot, spans(4, CUTS, 1), 1.0, False, 1)
    )
    assert torch.equal(gradients.of(batch, {}), anchor.gradient(batch, batch.response_tokens)[gradients.at])
    found = gradients.of(batch, trial.boundaries)
    weights = gradients.model.weights
    plain = plain_run(untied_model, batch, {layer: b.forward.basis.q for layer, b in trial.boundaries.items()})
    flat = torch.zeros(weights.numel)
    for name, gradient in plain.grad.items():
        flat[weights.slice_of(name)] = gradient.flatten()
    below = flat[gradients.at] != 0
    assert below.sum() > 1000
    assert torch.allclose(found[below], flat[gradients.at][below], rtol=1e-3, atol=1e-6)


OBJECTIVES = {
    "a mean of means": {"loss_agg_mode": "seq-mean-token-mean", "overlong_filter": True},
    "ratios of samples": {"importance_sampling_level": "sequence", "clip_ratio": 1e-3, "old_logprobs": "rollout"},
    "an entropy bonus": {"entropy_coeff": 0.1, "rollout_is": "token", "zero_variance": "drop", "group_size": 2},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_gradient_is_that_of_the_objective_that_is_configured(
    untied_model: Path, objective: dict, monkeypatch: pytest.MonkeyPatch
):
    """Also where blocks of the head cut samples: against the loss of the run, which takes all of them at once."""
    monkeypatch.setattr(codec_trial, "HEAD_ROWS", 7)
    grpo, device = GrpoConfig(**objective), torch.device("cpu")
    batch = weighted(replace(make_batch(), truncated=np.arange(16) % 5 == 0), grpo)
    (micro,) = microbatches(batch, np.arange(16), 16, device)
    halves = Halves(untied_model, 4, CUTS, torch.float32, device)
    with torch.no_grad():
        last = halves.upper(halves.lower(micro.ids, micro.real, {}), micro.real, {})
    head = Head(halves.upper, grpo, 0.9, batch.loss_tokens)
    _, found = head.compare(last[micro.predicts], last[micro.predicts], micro, with_gradient=True)
    last = last.requires_grad_()
    old = micro.rollout_logprobs if grpo.old_logprobs == "rollout" else None
    loss_terms(halves.upper, last, micro, old, batch.loss_tokens, grpo, 0.9).loss.backward()
    expected = last.grad[micro.predicts]
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_microbatches_add_up(untied_model: Path):
    found = []
    for size in (16, 3):
        overrides = [f"model.path={untied_model}", "swarm.boundaries=[1, 3]", f"swarm.micro_batch_size={size}"]
        trial, _ = trial_of(untied_model, load("k5", overrides), make_batch(), rank=12)
        found.append(dict(trial.sums) | {str(layer): _fvu(trial, layer) for layer in trial.boundaries})
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# --- draws of keys, and numbers of boundaries ----------------------------------------------------


@pytest.mark.parametrize(("bias", "noise"), [(0.0, 3.0), (2.0, 0.0), (2.0, 3.0)])
def test_bias_and_variance_of_a_gradient_are_told_apart(bias: float, noise: float):
    """With 8 draws the mean alone would say that unbiased ones are off by noise / √8."""
    generator, size = torch.Generator().manual_seed(1), 20_000

    def unit() -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)

    dense, direction = 5 * unit(), unit()
    found = gradient_error([dense + 5 * (bias * direction + noise * unit()) for _ in range(DRAWS)], dense)
    assert found.bias == pytest.approx(bias, abs=0.02 if bias else 0.2) and found.bias <= found.bound < bias + 0.3
    assert found.variance == pytest.approx(noise**2, rel=0.05)
    assert found.cosine == pytest.approx((1 + bias**2 + noise**2) ** -0.5, abs=0.02)
    one = gradient_error([dense + 5 * bias * direction], dense)
    assert (one.bias, one.bound, one.variance) == pytest.approx((bias, bias, 0.0), abs=1e-6)
    assert gradient_error([dense], torch.zeros(size)).bias == 0.0


def test_a_trial_at_fewer_boundaries_is_what_it_is_alone_and_draws_of_keys_leave_the_policy_as_it_was(
    untied_model: Path,
):
    """Beside trials at more of them; and the mean over draws is that of trials whose answers have those keys."""
    config, batch = load("k5", [f"model.path={untied_model}", "swarm.boundaries=[1, 3]"]), make_batch()
    codec = CodecConfig(kind="random_k", rank=24)
    found = []
    for cuts in ([[1]], [[1], [1, 3]]):
        halves = Halves(untied_model, 4, cuts[-1], torch.float32, torch.device("cpu"))
        trials = [Trial(codec, halves, 3, cut) for cut in cuts]
        calibrate(halves, trials, make_batch(seed=1), config, ignore)
        score(halves, trials, batch, config, ignore)
        found.append(trials)
    (alone,), (fewer, more) = found
    assert alone.sums == fewer.sums and len(alone.gradients) == DRAWS
    assert all(torch.equal(a, b) for a, b in zip(alone.gradients, fewer.gradients))
    assert not any(torch.equal(fewer.gradients[0], other) for other in fewer.gradients[1:])
    assert more.sums["kl"] > fewer.sums["kl"]


def test_boundaries_are_spread_evenly_beside_the_configs_own():
    assert sets_of_boundaries(30, [14], [7, 1, 3]) == [[14], [8, 15, 23], [4, 8, 11, 15, 19, 23, 26]]
    for layers in range(2, 40):
        for cut in sets_of_boundaries(layers, [1], range(1, layers)):
            assert cut == sorted(set(cut)) and 0 < cut[0] and cut[-1] < layers
    with pytest.raises(ConfigError, match="--boundaries 30: 30 layers have places for 1 to 29"):
        sets_of_boundaries(30, [15], [3, 30])
    assert numbers_of_boundaries("1, 3,7") == [1, 3, 7] and numbers_of_boundaries("") == []
    with pytest.raises(ConfigError, match="'x' is no number of boundaries"):
        numbers_of_boundaries("1,x")


# --- the laws, on the built-in model -------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Probe:
    config = load("k5", [*SMALL, "codec.rank=2"])
    ranks = (128, 32, 8, 2)
    candidates = [CodecConfig(kind="none"), *(config.codec.model_copy(update={"rank": r}) for r in ranks)]
    return probe(config, 200, ignore, candidates)


def test_no_codec_changes_nothing_to_the_bit(tiny: Probe):
    none = tiny.scores[0]
    assert none.kl == none.k1 == none.fvu == none.side_bytes == 0.0
    assert set(none.outside.values()) == {0.0}
    assert (none.gradient_cosine, none.dx_cosine, none.corr) == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    assert none.total_rate == none.payload_rate == 1.0 and none.forward_bytes == 4 * 128


def test_a_basis_of_the_whole_space_changes_nothing_but_rounding(tiny: Probe):
    whole = tiny.scores[1]
    assert abs(whole.kl) < 1e-7 and whole.gradient_cosine > 0.9999
    assert whole.payload_rate == 1.0 < whole.total_rate  # the bases are sent for nothing


def test_the_lower_the_rank_the_more_the_policy_changes(tiny: Probe):
    _, *ranks = tiny.scores
    assert [s.kl for s in ranks] == sorted(s.kl for s in ranks) and ranks[-1].kl > 0.5
    for measure in ("fvu", "kl"):
        assert all(getattr(a, measure) < getattr(b, measure) for a, b in pairwise(ranks))
    for measure in ("dx_cosine", "gradient_cosine", "corr", "total_rate", "forward_bytes"):
        assert all(getattr(a, measure) > getattr(b, measure) for a, b in pairwise(ranks))
    assert all(s.forward_bytes == s.backward_bytes == 4 * s.codec["rank"] for s in ranks)


def test_the_tokens_that_are_scored_are_as_many_as_asked_for_and_of_the_validation_split(tiny: Probe):
    assert tiny.tokens >= 200 and tiny.calibration_tokens >= 200
    assert not tiny.drawn_advantages and 0 < tiny.gradient_tokens <= tiny.tokens


def test_the_advice_names_the_configured_codec_and_the_cheapest_that_keeps_the_policy(tiny: Probe):
    own, cheapest = advice(tiny)
    assert own.startswith("Configured, powersgd r=2:") and "powersgd r=8" in cheapest


def test_side_information_is_spread_over_the_refresh_schedule(tiny: Probe):
    """A basis of 4·H·r bytes in every fifth tick and in tick 2, each tick of 64 answers."""
    config, own = tiny.config, next(s for s in tiny.scores if s.own)
    ticks = config.run.steps * config.grpo.ticks_per_step
    per_tick = (ticks // 5 + 1) / ticks * 4 * 128 * 2
    assert per_tick / own.side_bytes / 64 == pytest.approx(21, abs=4)  # tokens of an answer and its prompt


def test_each_codec_is_compared_once_and_the_configured_one_is_among_them():
    def found(own: CodecConfig) -> list[CodecConfig]:
        return compared_with(load("k5").model_copy(update={"codec": own}), 128)

    own = CodecConfig(kind="powersgd", rank_ratio=0.125)
    candidates = found(own)
    assert [c.rank for c in candidates[:1]] == [6] and candidates.count(own) == 1
    assert sum(c.kind == "powersgd" for c in candidates) == 2
    assert len({codec_cost(c, BoundaryShape(128, 4), Tokens(1e6, 20)).name for c in candidates}) == len(candidates)
    assert found(CodecConfig(kind="powersgd", rank=7))[-1].rank == 7
    assert found(CodecConfig(kind="none"))[-1].kind == "none"


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_the_numbers(tmp_path: Path):
    out = tmp_path / "probe.json"
    overrides = [x for o in SMALL for x in ("--set", o)]
    result = CliRunner().invoke(
        app, ["probe", "k5", *overrides, "--tokens", "20", "--boundaries", "3", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "Configured, powersgd r=4" in result.output
    data = json.loads(out.read_text())
    names = {
        "powersgd r=4",
        "powersgd r=6",
        "random_k k=6",
        "transform entropy 5 / 5 %",
        "transform entropy dither 5 / 5 %",
    }
    found = {(s["name"], len(s["boundaries"])): s for s in data["scores"]}
    assert found.keys() >= {(name, n) for name in names for n in (1, 3)}
    for name in names:
        assert found[name, 3]["token_bytes"] > 2.5 * found[name, 1]["token_bytes"]
        assert (
            (found[name, 1]["gradient_variance"] > 0)
            == (found[name, 1]["draws"] > 1)
            == ("k=" in name or "dither" in name)
        )
    assert data["tokens"] >= 20 and data["advice"]
    assert " ".join(data["worth"]["words"].split()) in " ".join(result.output.split())
    assert make_plan(load("k5"), probe=out).worth == Worth(load("k5"), Measured(**data["worth"]["measured"]))


def test_a_config_without_boundaries_is_refused():
    with pytest.raises(ConfigError, match=r"swarm\.boundaries is empty"):
        probe(load("k5", ["swarm.boundaries=[]"]), 10, ignore)
    result = CliRunner().invoke(app, ["probe", "k5", "--set", "swarm.boundaries=[]"])
    assert result.exit_code == 2 and "swarm.boundaries is empty" in result.output
