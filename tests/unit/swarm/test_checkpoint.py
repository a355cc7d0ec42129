"""What a checkpoint holds where a rank was lost as it saved: no more than the ranks that are left have written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from swarm import checkpoint
from swarm.manifest import CheckpointError, Entry


def save(folder: Path, d: int, p: int) -> dict[str, Entry]:
    grid = SimpleNamespace(d=d, p=p, name=f"worker d{d}p{p}")
    rank = SimpleNamespace(grid=grid, state=lambda: ({"weights": torch.zeros(100)}, {}))
    return checkpoint.save_rank(cast(Any, rank), str(folder), 1)


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("left", ["whole", "torn", "first stage alone"])
def test_what_a_replica_that_is_no_more_has_left_is_no_part_of_it(left: str, tmp_path: Path):
    with checkpoint.CheckpointWriter(tmp_path, 1) as writer:
        for d in range(2):
            for p in range(1 if d and left == "first stage alone" else 2):
                save(writer.path, d, p)
        if left == "torn":
            torn(checkpoint.rank_file(writer.path, 1, 1))
        writer.commit({"step": 1}, {}, [save(writer.path, 0, p) for p in range(2)])  # asked again: a replica fewer
    folder = checkpoint.folder_of(tmp_path, 1)
    assert checkpoint.newest_good(tmp_path) == (folder, []) and checkpoint.replicas_in(folder) == 1
    files = {"manifest.json", "rank-d0p0.safetensors", "rank-d0p1.safetensors", "state.json"}
    assert {file.name for file in folder.iterdir()} == files


def test_a_torn_file_that_the_manifest_does_not_name_makes_way_for_the_one_before_it(tmp_path: Path):
    for step in (1, 2):
        with checkpoint.CheckpointWriter(tmp_path, step) as writer:
            writer.commit({"step": step}, {}, [save(writer.path, 0, 0)])
    newest = checkpoint.folder_of(tmp_path, 2)
    save(newest, 1, 0)
    torn(checkpoint.rank_file(newest, 1, 0))
    with pytest.raises(CheckpointError, match=r"rank-d1p0\.safetensors is damaged"):
        checkpoint.verify(newest)
    found, wrong = checkpoint.newest_good(tmp_path)
    assert found == checkpoint.folder_of(tmp_path, 1) and len(wrong) == 1
