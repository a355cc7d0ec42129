"""What a process asks of the device where its tensors live."""

from __future__ import annotations

import resource

import torch


def ordinal(gpu: str, visible: str) -> int:
    """torch's number of the GPU that Ray calls `gpu`: its place in the mask that the node was started with, if any.

    As in Ray Train's `get_devices`; with a mask Ray's names are the mask's own, numbers or UUIDs.
    """
    return visible.split(",").index(gpu) if visible else int(gpu)


def peak_memory_gb(device: torch.device) -> float:
    """Allocated peak on a GPU, resident peak of the process on a CPU, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def prefer_determinism(device: torch.device) -> None:
    """On a GPU: kernels that give the same bits each time, wherever torch has them; it warns where it has none.

    Otherwise the order of additions in `index_add_` or in the backward of attention differs from run to run. What a
    CPU does here is deterministic as it is. cuBLAS reads its part from CUBLAS_WORKSPACE_CONFIG, set by the fleet.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010, a check for debugging, at a price
