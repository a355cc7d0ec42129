"""A checkpoint is of any number of replicas: on another number the run goes on as if it had been that one all along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codec.config import CodecConfig, GradientConfig
from merger.config import MergerConfig
from swarm import checkpoint
from swarm.manifest import CheckpointError
from swarm.messages import TickPlan
from swarm.tick import tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch, signs_by_name

PARTS = [(1, 3), (4, 5), (6, 7)]  # ticks; with a cadence of 2 the tables are made anew right after the first change


def _part(
    rank: int, init: str, options: dict, ticks: tuple[int, int], start: str, end: str
) -> tuple[list[float], dict]:
    """Losses of the ticks from the checkpoint `start`, if there is one; what is saved in `end`, and the first gradient.

    From tick 2 on a correction is merged, which is held through the checkpoints.
    """
    state = make_rank(rank=rank, init=init, merger=MergerConfig(kind="signed_ema"), **options)
    if start:
        checkpoint.restore_rank(state, start)
    losses, gradients = [], []
    for t in range(ticks[0], ticks[1] + 1):
        batch, correction = make_batch(seed=t), signs_by_name(state) if t == 2 else None
        plan = TickPlan(t, 0, correction, int(t >= 2))
        report = tick(state, plan, mini_batch(state, batch), lambda c: c)
        losses.append(report.sums.get("actor/pg_loss", 0.0) / batch.response_tokens)
        gradients.append(state.stage.weights.grad.numpy().copy())
    checkpoint.save_rank(state, end, ticks[1])
    saved = {name: tensor.numpy().copy() for name, tensor in state.state()[0].items()}
    return losses, saved | {"first gradient": gradients[0]}


def _run(
    model: Path, run: Path, grids: tuple[int, int, int], pp: int, **options
) -> tuple[np.ndarray, list[list[dict]]]:
    losses, start, states = [], "", []
    for dp, ticks in zip(grids, PARTS):
        end = run / f"{ticks[1]}"
        end.mkdir(parents=True)
        made = dict(folder=model, dp=dp, pp=pp, **options)
        found = on_ranks(dp * pp, _part, made, ticks, start, str(end))
        losses += list(np.sum([of_rank for of_rank, _ in found], axis=0))
        states.append([state for _, state in found])
        start = str(end)
    return np.array(losses), states


@pytest.mark.parametrize(("grids", "pp"), [((1, 2, 1), 2), ((2, 1, 3), 1)])
def test_gradients_losses_and_weights_are_those_of_a_grid_that_did_not_change(
    untied_model: Path, grids: tuple[int, int, int], pp: int, tmp_path: Path
):
    fixed, reference = _run(untied_model, tmp_path / "fixed", (1, 1, 1), pp)
    changed, states = _run(untied_model, tmp_path / "changed", grids, pp)
    np.testing.assert_allclose(changed, fixed, rtol=1e-4)
    for part, expected in zip(states, reference):
        for p in range(pp):
            wanted = expected[p]["first gradient"]
            assert np.abs(wanted).max() > 1e-3
            np.testing.assert_allclose(part[p]["first gradient"], wanted, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(part[p]["weights"], expected[p]["weights"], atol=1e-5)
        assert len({state["weights"].tobytes() for state in part[::pp]}) == 1


def test_what_was_owed_is_still_owed_once(untied_model: Path, tmp_path: Path):
    """Over all replicas, whatever their number; and one that is alone owes nobody."""
    codec = CodecConfig(kind="powersgd", rank=8, gradient=GradientConfig(kind="sign"))
    options = dict(folder=untied_model, codec=codec)
    (tmp_path / "saved").mkdir()
    found = on_ranks(3, _part, options | dict(dp=3, pp=1), (1, 2), "", str(tmp_path / "saved"))
    owed = np.sum([state["reducer.own.error"] for _, state in found], axis=0)
    assert np.abs(owed).max() > 0
    for dp in (2, 4):
        now = on_ranks(dp, _restored, options | dict(dp=dp, pp=1), str(tmp_path / "saved"))
        np.testing.assert_allclose(np.sum(now, axis=0), owed, atol=1e-6)
    assert on_ranks(1, _restored, options | dict(dp=1, pp=1), str(tmp_path / "saved")) == [None]


def _restored(rank: int, init: str, options: dict, folder: str) -> np.ndarray | None:
    state = make_rank(rank=rank, init=init, **options)
    checkpoint.restore_rank(state, folder)
    error = state.state()[0].get("reducer.own.error")
    return None if error is None else error.numpy().copy()


def test_rows_that_were_seen_count_once(untied_model: Path, tmp_path: Path):
    """Of a codec that pools what all replicas saw."""
    options = dict(folder=untied_model, codec=CodecConfig(total_rate=0.3))
    (tmp_path / "saved").mkdir()
    on_ranks(2, _part, options | dict(dp=2, pp=1), (1, 3), "", str(tmp_path / "saved"))
    seen = [_seen(tmp_path / "saved", options, dp) for dp in (1, 2, 3)]
    assert seen[0] == seen[1] == seen[2] and seen[0] > 0


def _seen(folder: Path, options: dict, dp: int) -> float:
    return sum(on_ranks(dp, _count, options | dict(dp=dp, pp=1), str(folder)))


def _count(rank: int, init: str, options: dict, folder: str) -> float:
    state = make_rank(rank=rank, init=init, **options)
    checkpoint.restore_rank(state, folder)
    return float(state.state()[0]["codec.2.fwd.moments.fresh"][0])


def test_other_stages_are_refused(untied_model: Path, tmp_path: Path):
    checkpoint.save_rank(make_rank(untied_model), str(tmp_path), 1)
    with pytest.raises(
        CheckpointError, match=r"holds no rank-d0p1.safetensors: swarm.pp must be that of the saved run"
    ):
        checkpoint.restore_rank(_second_stage(make_rank(untied_model)), str(tmp_path))


def _second_stage(rank):
    rank.grid.p = 1
    return rank
