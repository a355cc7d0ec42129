"""What actors are asked for, how long it is waited for, and what it is called when it fails."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import ray
from ray._private.state import actors
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
    WorkerCrashedError,
)
from ray.experimental import get_object_locations

from anchor_service.errors import ARGUMENT, ActorLost, WaitTimeout

__all__ = [
    "ActorHandle",
    "Alarm",
    "Calls",
    "answered",
    "done_of",
    "failure",
    "gather",
    "lost",
    "process_of",
    "raised",
    "replies",
    "salvaged",
    "several",
    "take",
]

Calls = list[tuple[str, object]]  # the name of an actor, and a reference to what it delivers

VERDICT_S = 30.0  # Ray takes up to 25 s to call a node dead that sends no heartbeat
_WHERE = re.compile(r'^ +File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
_FIELDS = tuple(f"\t{name}: " for name in ("class_name", "actor_id", "pid", "name", "namespace", "ip"))
_PROCESS = re.compile(r"\(pid=(\d+), ip=([^,)]+)")


class Alarm(Protocol):
    """Who is told of a wait that goes on: once when it is slow, and when it is over in vain."""

    slow_after: float  # seconds; infinite: it never is
    seconds: float  # after which it is over
    knob: str  # that says so

    def slow(self, missing: Sequence[str]) -> None: ...

    def over(self, missing: Sequence[str]) -> WaitTimeout: ...


def gather(
    calls: Iterable[tuple[str, object]],
    what: str,
    seconds: float,
    knob: str,
    since: float | None = None,
    settle: float = 0.0,
    alarm: Alarm | None = None,
) -> list[Any]:
    """Objects that named actors deliver, in order. The first failure ends the wait; the deadline names who is missing.

    `seconds` count from now, or from `since` on the monotonic clock if several waits share one deadline. A failure
    that is only another's echo (`secondhand`) waits `settle` seconds for one that says more.
    Raises WaitTimeout or what the `alarm` makes of it, ActorLost, or what an actor raised, with a note of where.
    """
    names = {reference: name for name, reference in calls}
    found: dict[Any, Any] = {}
    waiting, echo = list(names), None
    begin = time.monotonic() if since is None else since
    deadline, slow = begin + seconds, begin + (alarm.slow_after if alarm else math.inf)
    while waiting:
        until = min(deadline, slow)
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
        if not done:
            missing = list(dict.fromkeys(names[reference] for reference in waiting))
            if alarm and until < deadline:
                slow = math.inf
                alarm.slow(missing)
                continue
            raise echo or (alarm.over(missing) if alarm else WaitTimeout(", ".join(missing), what, seconds, knob))
        try:
            found[done[0]] = take(done[0], names[done[0]], what)
        except Exception as error:
            if not (settle and getattr(error, "secondhand", False)):
                raise
            if echo is None:
                echo, deadline = error, min(deadline, time.monotonic() + settle)
    if echo:
        raise echo
    return [found[reference] for reference in names]


def replies(calls: Iterable[tuple[str, object]], what: str, seconds: float, knob: str) -> list[Any]:
    """What named actors deliver, in order, each object or else the error: WaitTimeout, ActorLost, or what it raised."""
    calls, found = list(calls), list[Any]()
    since = time.monotonic()
    for name, reference in calls:
        try:
            found += gather([(name, reference)], what, seconds, knob, since=since)
        except Exception as error:
            found.append(error)
    return found


def salvaged(
    calls: Mapping[str, object], what: str, limit: tuple[float, str]
) -> tuple[dict[str, Any], dict[str, ActorLost | WaitTimeout]]:
    """What these deliver by their names, and of those that were lost or did not come, how. Raises any other error."""
    found = dict(zip(calls, replies(calls.items(), what, *limit), strict=True))
    gone = {name: error for name, error in found.items() if isinstance(error, ActorLost | WaitTimeout)}
    for error in found.values():
        if isinstance(error, Exception) and not isinstance(error, ActorLost | WaitTimeout):
            raise error
    return {name: value for name, value in found.items() if name not in gone}, gone


def process_of(actor: ActorHandle[Any]) -> tuple[int | None, str | None]:
    """Number of an actor's process, and Ray's id of its node, from Ray's control store: the actor is not asked."""
    known = _actor(actor._actor_id.hex())  # pyright: ignore[reportPrivateUsage]
    return known.get("Pid"), known.get("Address", {}).get("NodeID")


def answered(calls: Mapping[str, object], seconds: float) -> dict[str, Any]:
    """Of actors that were asked something at once: what those say that answer within `seconds`. Never raises."""
    waiting, found = cast("list[ray.ObjectRef[Any]]", list(calls.values())), dict[str, Any]()
    done = ray.wait(waiting, num_returns=len(waiting), timeout=seconds)[0] if waiting else []
    for name, reference in calls.items():
        with suppress(Exception):  # one that has died is no answer: whoever waits for it is told why
            if reference in done:
                found[name] = ray.get(cast("ray.ObjectRef[Any]", reference))
    return found


def several(returned: object) -> list[object]:
    """The references that a call with `num_returns` gave: one for each, which Ray's annotations do not know."""
    return cast("list[object]", returned)


def done_of(references: list[object]) -> tuple[list[object], list[object]]:
    """Those of calls that are over, and the others; waits for nothing."""
    if not references:
        return [], []
    waiting = cast("list[ray.ObjectRef[Any]]", references)
    done, others = ray.wait(waiting, num_returns=len(waiting), timeout=0)
    return list(done), list(others)


def take(reference: object, who: str, what: str) -> Any:
    """The object of a call that is over. Raises ActorLost, or what the actor raised."""
    try:
        return ray.get(cast("ray.ObjectRef[Any]", reference))
    except RayError as error:
        raise failure(error, who, what) from error


def raised(reference: object, who: str, what: str = "its call") -> Exception | None:
    """What a call that is over raised, if it did."""
    try:
        take(reference, who, what)
    except Exception as error:
        return error
    return None


def lost(references: Sequence[object]) -> bool:
    """Whether one of these objects, which were there once, went with the node that it lay on.

    Its owner finds that out at once, and puts an error in its place, on its own node; a small one lies in its memory.
    """
    held = cast("list[ray.ObjectRef[Any]]", list(references))
    here, dead = ray.get_runtime_context().get_node_id(), _dead_nodes()
    for reference, found in (get_object_locations(held) if held else {}).items():
        nodes = set(found["node_ids"])
        if nodes and (nodes <= dead.keys() or (here in nodes and raised(reference, "its owner"))):
            return True
    return False


def failure(error: RayError, who: str, what: str) -> Exception:
    """What Ray raised for a call of `who`, without the traceback of its own machinery."""
    if isinstance(error, RayTaskError):
        return _task_failure(error, who, what)
    if isinstance(error, RayActorError):
        return ActorLost(who, what, _death(error))
    if isinstance(error, OutOfMemoryError | NodeDiedError | WorkerCrashedError):
        return ActorLost(who, what, str(error))
    if isinstance(error, ObjectLostError):
        return ActorLost(who, what, _loss(error))
    if isinstance(error, UnserializableException):
        return _noted(RuntimeError(_raised(str(error))), str(error), who, what)
    return _noted(error, "", who, what)


def _task_failure(error: RayTaskError, who: str, what: str) -> Exception:
    cause = error.cause
    if isinstance(cause, RayActorError):  # an argument of the call was to come from that actor
        return ActorLost(f"{ARGUMENT}{who} gets an argument from", what, _death(cause))
    if isinstance(cause, ObjectLostError):
        return ActorLost(f"{ARGUMENT}{who} gets an argument from", what, _loss(cause))
    if type(cause) is RayError:  # Ray could not pickle it, and has put its traceback in words
        cause = RuntimeError(_raised(str(cause)))
    return _noted(cause, str(error), who, what)


def _noted(error: Exception, trace: str, who: str, what: str) -> Exception:
    """`error` with a note: which actor and process raised it, at which line."""
    process, line = _PROCESS.findall(trace), _WHERE.findall(trace)
    at = [f"process {process[-1][0]} on {process[-1][1]}"] if process else []
    at += ["{}, line {}, in {}".format(*line[-1])] if line else []
    error.add_note(f"raised by {who}, asked for {what}" + (f" ({'; '.join(at)})" if at else ""))
    return error


def _raised(trace: str) -> str:
    """The last exception of a printed traceback, type and message whole."""
    lines = trace.strip().splitlines()
    last = max((i for i, line in enumerate(lines) if _WHERE.match(line)), default=-1)
    rest = lines[last + 1 :]
    while rest and rest[0].startswith("    "):  # the line of code and its carets
        rest = rest[1:]
    return "\n".join(rest) or trace


def _death(error: RayActorError) -> str:
    """By what an actor died, and where. Waits up to VERDICT_S for Ray to find out whether its node did."""
    if error.actor_init_failed:
        return f"it could not be constructed: {_raised(str(error))}"
    deadline = time.monotonic() + (VERDICT_S if isinstance(error, ActorUnavailableError) else 0.0)
    while not (dead := _dead_node_of(error.actor_id)) and _alive(error.actor_id) and time.monotonic() < deadline:
        time.sleep(0.5)
    lines = str(error).removeprefix(error.BASE_ERROR_MSG).strip("\n ").splitlines()
    fields = dict(line.strip().split(": ", 1) for line in lines if line.startswith(_FIELDS))
    reason = [line for line in lines if not line.startswith(_FIELDS)] or [error.BASE_ERROR_MSG]
    at = [f"process {fields['pid']} on {fields.get('ip', 'an unknown node')}"] if "pid" in fields else []
    return "\n".join([*([dead] if dead else []), *reason, *at])


def _loss(error: ObjectLostError) -> str:
    last = str(error).strip().splitlines()[-1]  # before it: how to debug references
    return "\n".join([f"what it delivered is lost: {last}", *_dead_nodes().values()])


def _alive(actor_id: str | None) -> bool:
    return _actor(actor_id).get("State") == "ALIVE"


def _dead_node_of(actor_id: str | None) -> str:
    """In words, if the actor's node is no longer part of the cluster; else empty."""
    return _dead_nodes().get(_actor(actor_id).get("Address", {}).get("NodeID"), "")


def _dead_nodes() -> dict[str, str]:
    """Id of every node that has died -> who it was and why, in words."""
    with suppress(Exception):  # with the control store gone too, nobody knows
        return {
            node["NodeID"]: f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) died: "
            f"{node.get('DeathReasonMessage') or 'Ray gives no reason'}"
            for node in ray.nodes()
            if not node["Alive"]
        }
    return {}


def _actor(actor_id: str | None) -> dict[str, Any]:
    """What Ray's control store knows of it; nothing if it does not answer."""
    with suppress(Exception):  # what is wrong is about to be said: no other error in its place
        return actors(actor_id) if actor_id else {}
    return {}
