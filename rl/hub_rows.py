"""Rows of a data set by the `datasets` library: of the hub, or of files and folders on this machine. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rl.data_rows import DataRows

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # in a folder that save_to_disk wrote


def check_hub_rows(name: str) -> None:
    """Raises ValueError where `hf:name` cannot be a data set. Imports and fetches nothing."""
    if not name:
        raise ValueError("hf needs a data set: hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, or hf:PATH of a folder or file")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("hf:… needs the datasets extra: pip install 'northstar[datasets]'")
    if is_local(name):
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"no such file or folder: {name!r}")
        if path.is_file() and path.suffix not in BUILDERS:
            raise ValueError(f"{name!r}: a file must end in {', '.join(BUILDERS)}")
    elif name.count("/") > 2:
        raise ValueError(f"{name!r}: no such folder, and a data set of the hub is OWNER/NAME or OWNER/NAME/CONFIG")


def hub_rows(name: str, split: str) -> DataRows:
    """The `datasets.Dataset` of one split. Raises ValueError with what to do."""
    try:
        return DataRows(f"hf:{name}, split {split!r}", _load(name, split))
    except Exception as error:  # of the library, the hub or the network, each with kinds of their own
        hint = "" if is_local(name) else "; where there is no network, fetch it elsewhere and give its folder: hf:PATH"
        raise ValueError(
            f"hf:{name}: split {split!r} cannot be loaded ({type(error).__name__}: {error}){hint}"
        ) from error


def _load(name: str, split: str) -> Any:
    import datasets

    if not is_local(name):
        parts = name.split("/")
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    path = Path(name).expanduser()
    if path.is_file():  # a single file has one split, which the library calls so
        return datasets.load_dataset(BUILDERS[path.suffix], data_files={split: str(path)}, split=split)
    if not any((path / saved).exists() for saved in SAVED):
        return datasets.load_dataset(str(path), split=split)
    found = datasets.load_from_disk(str(path))
    return found[split] if isinstance(found, datasets.DatasetDict) else found


def is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists()
