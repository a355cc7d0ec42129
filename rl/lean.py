"""transformers without what it drags in and no model here reaches: half of the CPU time that a process takes to start.

    torch._dynamo    what compiles; here it would only mark functions, of transformers and of the meta device, as not to be
    DTensor, FSDP    transformers' own tensor parallelism
    scipy            which box belongs to which, in losses of object detection

1.6 s of a core in every worker, engine and anchor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_GETITEM = "torch._dynamo._trace_wrapped_higher_order_op"  # masks given as functions of a user's are mapped with it
_PROBES = ("is_scipy_available", "is_torch_distributed_available")


@contextmanager
def lean_transformers() -> Generator[None]:
    """What is imported or built inside binds decorators that change nothing, and probes that say no; it keeps them.

    After it torch and transformers are to all others as they were.
    """
    if "torch._dynamo" in sys.modules:  # paid for already
        yield
        return
    dynamo, getitem = ModuleType("torch._dynamo"), ModuleType(_GETITEM)
    setattr(dynamo, "__getattr__", lambda _: _unchanged)  # noqa: B010
    setattr(getitem, "TransformGetItemToIndex", lambda: import_module(_GETITEM).TransformGetItemToIndex())  # noqa: B010
    with ExitStack() as stack:
        stack.enter_context(_replaced(sys.modules, {"torch._dynamo": dynamo, _GETITEM: getitem}))
        stack.enter_context(_replaced(torch.__dict__, {"_dynamo": dynamo}))
        for name in ("transformers.utils.import_utils", "transformers.utils"):
            stack.enter_context(_replaced(import_module(name).__dict__, dict.fromkeys(_PROBES, _no)))
        yield


def _no() -> bool:
    return False


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A decorator, with or without arguments."""
    return _unchanged if function is None else function


@contextmanager
def _replaced(names: dict[str, Any], others: Mapping[str, Any]) -> Generator[None]:
    before = {name: names[name] for name in others if name in names}
    names.update(others)
    try:
        yield
    finally:
        for name in others:
            names.pop(name, None)
        names.update(before)
