"""Checkpoints: safetensors a rank, written under a temporary name, renamed when complete, and read only if whole.

A resumed run takes the same ticks as one that was never stopped: Adam's moments, every basis and
its statistics, error feedback, the held correction and the fires under way are all part of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swarm import manifest
from swarm.manifest import CheckpointError, NotWritten
from swarm.rank import Rank


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def all_of(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-??????"))


def newest_good(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with those after it.

    Raises CheckpointError if there is none.
    """
    wrong: list[str] = []
    for folder in reversed(all_of(run)):
        try:
            verify(folder)
        except CheckpointError as error:
            wrong.append(str(error))
        else:
            return folder, wrong
    if wrong:
        raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(wrong)}")
    raise CheckpointError(f"{run} has no checkpoint: set run.checkpoint_every before the run starts")


def at_step(run: Path, step: int) -> Path:
    """The checkpoint of one step. Raises CheckpointError, with the steps there are, if it is not there or not whole."""
    folder = folder_of(run, step)
    if not folder.is_dir():
        found = [int(path.name.removeprefix("step-")) for path in all_of(run)]
        kept = f"it has those of steps {', '.join(map(str, found))}" if found else "set run.checkpoint_every"
        raise CheckpointError(f"{run} has no checkpoint of step {step}: {kept}")
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Raises CheckpointError, naming the file, where something is damaged, missing or not finite."""
    manifest.check(folder)
    for file in sorted(folder.glob("rank-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except SafetensorError as error:  # of a file that the manifest does not know
            raise CheckpointError(f"{file} is damaged: {error}") from None
        _check_finite(file, tensors)
    m_bar = read_frame(folder, "m_bar")
    if m_bar is not None:
        _check_finite(folder / "m_bar.frame", {"M̄": torch.from_numpy(m_bar.view(np.float32))})


def _check_finite(where: str | Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(f"{where}: {', '.join(bad)} holds numbers that are not finite")


class CheckpointWriter:
    """A checkpoint folder that appears under its name only when `commit` is called; else, as a context, it is gone.

    All of it raises NotWritten where the disk takes no more.
    """

    def __init__(self, run: Path, step: int, keep: int = 2):
        self.final, self.keep = folder_of(run, step), keep
        self.path = self.final.with_name(self.final.name + ".partial")
        for left in self.final.parent.glob("step-*.partial"):  # by a run that was killed in it
            shutil.rmtree(left, ignore_errors=True)
        with manifest.writing(self.path):
            self.path.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # nothing, if it has its name

    def commit(
        self, state: dict[str, Any], frames: dict[str, np.ndarray], ranks: list[dict[str, manifest.Entry]]
    ) -> None:
        """`state` as JSON, `frames` as raw bytes, beside the files of `ranks`, each with what its rank says of it.

        Then renamed, and all but the newest `keep` dropped. Files of other ranks are of some that were lost as they saved,
        or have another number by now: whoever counts replicas would take them for one.
        """
        with manifest.writing(self.path):
            for name, frame in frames.items():
                (self.path / f"{name}.frame").write_bytes(frame.tobytes())
            (self.path / "state.json").write_text(json.dumps(state))
            own = ["state.json", *(f"{name}.frame" for name in frames)]
            entries = {name: manifest.entry(self.path / name) for name in own}
            for rank in ranks:
                entries |= rank
            for left in {file.name for file in self.path.glob("rank-*.safetensors")} - entries.keys():
                (self.path / left).unlink()
            manifest.write(self.path, entries)
            shutil.rmtree(self.final, ignore_errors=True)
            self.path.rename(self.final)
            manifest.sync(self.final.parent)
        for old in all_of(self.final.parent.parent)[: -self.keep]:
            shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def read_frame(folder: Path, name: str) -> np.ndarray | None:
    """None if the checkpoint has no such frame."""
    file = folder / f"{name}.frame"
    return np.fromfile(file, np.uint8) if file.exists() else None


def frame_of(folder: Path, name: str) -> np.ndarray:
    """Raises CheckpointError if the checkpoint has no such frame."""
    found = read_frame(folder, name)
    if found is None:
        raise CheckpointError(f"{folder} holds no {name}.frame: it is not whole")
    return found


def rank_file(folder: str | Path, d: int, p: int) -> Path:
    return Path(folder) / f"rank-d{d}p{p}.safetensors"


def save_rank(rank: Rank, folder: str, step: int) -> dict[str, manifest.Entry]:
    """All that this rank needs to go on after `step`; what the manifest is to say of its file, by name.

    Raises CheckpointError where a number is not finite: a checkpoint of it would drop one that is good; NotWritten.
    """
    state, fields = rank.state()
    tensors = _apart({k: v.detach().cpu().contiguous() for k, v in state.items()})
    file = rank_file(folder, rank.grid.d, rank.grid.p)
    _check_finite(f"{rank.grid.name} at step {step}", tensors)
    try:
        save_file(tensors, file, metadata={"fields": json.dumps({"step": step} | fields)})
    except SafetensorError as error:  # what the system said is in its text alone
        raise NotWritten(str(file), str(error)) from None
    with manifest.writing(file):
        return {file.name: manifest.entry(file)}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, of which no two share memory: safetensors refuses two names for one."""
    held: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in held else tensor
        held.add(memory)
    return tensors


def replicas_in(folder: Path) -> int:
    """How many replicas it was saved of."""
    return len(list(folder.glob("rank-d*p0.safetensors")))


def owes(folder: Path) -> bool:
    """Whether its replicas have lost something on the way to a sum of gradients, and are still to send it."""
    with safe_open(rank_file(folder, 0, 0), framework="pt") as f:
        return "reducer.own.error" in f.keys()


def restore_rank(rank: Rank, folder: str) -> None:
    """Copies are equal but for their parts in sums to come: of those that are no more the first takes theirs, and one
    that was not there when this was saved begins as a copy of the first, with none.

    Raises CheckpointError if the stages or the model are not those that were saved.
    """
    grid, saved = rank.grid, replicas_in(Path(folder))
    new = grid.d >= saved
    file = rank_file(folder, 0 if new else grid.d, grid.p)
    if not file.exists():
        raise CheckpointError(f"{folder} holds no {file.name}: swarm.pp must be that of the saved run")
    tensors, fields = _read_rank(file)
    if new:
        tensors |= {name: torch.zeros_like(tensors[name]) for name in rank.summed() if name in tensors}
    for gone in range(grid.dp, saved) if grid.d == 0 else ():
        others = _read_rank(rank_file(folder, gone, grid.p))[0]
        tensors |= {name: tensors[name] + others[name] for name in rank.summed() if name in tensors}
    try:
        rank.restore(tensors, fields)
    except ValueError as error:
        raise CheckpointError(f"{file.name} {error}") from error


def _read_rank(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["fields"])
