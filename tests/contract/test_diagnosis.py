"""What a diagnosed tick keeps, and what the diagnosis says of it, on the tick that a run makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseSetup
from anchor_service.diagnosis import Diagnoser
from anchor_service.messages import Correction, pack_record
from codec.config import CodecConfig
from merger.config import MergerConfig
from rl.batch import Batch
from rl.config import GrpoConfig, ModelConfig, SnapshotConfig
from rl.spans import spans
from swarm.messages import TickPlan
from swarm.tick import tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import LAYERS, make_rank, mini_batch

GRPO = GrpoConfig(lr=1e-3, group_size=4)


def work(rank: int, init: str, folder: Path, pp: int, keys: dict, correction: int | None, record: bool) -> tuple:
    """One tick on old log-probs of the engine; its record, its weights, and whether anything is left over."""
    state = make_rank(folder, rank, pp=pp, grpo=GRPO, init=init, **keys)
    held = None
    if correction is not None:
        held = Correction(1, 0, 1, torch.full((state.stage.weights.numel,), correction, dtype=torch.int8), "")
    plan = TickPlan(1, 0, held, 0 if held is None else 1, False, record)
    tick(state, plan, mini_batch(state, make_batch(), size=16), lambda c: c)
    weights = state.stage.weights
    after = weights.master.detach().numpy()
    return pack_record(state.kept | {"after": after[: weights.owned]}, 1, state.grid.p), after, sorted(state.kept)


def diagnose(folder: Path, records: list[np.ndarray], pp: int = 1, batch: Batch | None = None) -> dict[str, float]:
    stages, batch = spans(LAYERS, [2], pp), batch or make_batch()
    d = Diagnoser(
        DenseSetup(AnchorConfig(), ModelConfig(path=str(folder)), GRPO, SnapshotConfig(), stages, 1.0, False, 1)
    )
    replay = batch.to_frame(step=1, index=0, denominator=batch.response_tokens)
    return d.diagnose(1, replay, None, None, None, *records)


NO_CODEC = {"codec": CodecConfig(kind="none")}


@pytest.mark.parametrize("pp", [1, 2])
def test_without_codec_and_correction_g_comp_is_the_true_gradient(model: Path, pp: int):
    ranks = on_ranks(pp, work, model, pp, NO_CODEC, None, True)
    assert ranks[0][2] == ["before", "g_comp"]
    found = diagnose(model, [record for record, *_ in ranks], pp)
    assert found["diagnostics/cos_g_comp"] == pytest.approx(1, abs=1e-6)
    assert found["diagnostics/sign_g_comp"] > 0.99  # float noise may turn what is nearly 0
    assert "diagnostics/cos_merged" not in found and "diagnostics/cos_m_bar" not in found


def test_a_codec_shows_and_pipelines_agree_on_how_much(tied_model: Path):
    found = []
    for pp in (1, 2):
        ranks = on_ranks(pp, work, tied_model, pp, {"merger": MergerConfig()}, -1, True)
        assert ranks[0][2] == ["before", "g_comp", "merged"]
        found.append(diagnose(tied_model, [record for record, *_ in ranks], pp))
    assert abs(found[0]["diagnostics/cos_g_comp"]) < 0.99
    for name in (name for name in found[0] if name.startswith("diagnostics/") and "bytes" not in name):
        assert found[0][name] == pytest.approx(found[1][name], abs=2e-3)


def test_a_tick_that_is_not_diagnosed_keeps_nothing_and_makes_the_same_weights(tied_model: Path):
    keys = {"merger": MergerConfig(placebo="random"), "anchor": AnchorConfig(delay_k=1, cadence=1)}
    ((_, on, kept),) = on_ranks(1, work, tied_model, 1, keys, None, True)
    ((_, off, nothing),) = on_ranks(1, work, tied_model, 1, keys, None, False)
    assert np.array_equal(on, off) and nothing == []
    assert kept == ["before", "g_comp", "m_bar", "merged"]  # of a placebo, the signs that it gave


def test_of_a_placebo_the_signs_are_compared(tied_model: Path):
    keys = {"merger": MergerConfig(placebo="own"), "anchor": AnchorConfig(delay_k=1, cadence=1)}
    ((record, *_),) = on_ranks(1, work, tied_model, 1, keys, None, True)
    found = diagnose(tied_model, [record])
    assert found["diagnostics/sign_m_bar"] == found["diagnostics/sign_g_comp"]
    assert found["diagnostics/cos_merged"] == pytest.approx(found["diagnostics/cos_g_comp"])
    assert "diagnostics/cos_source" not in found
