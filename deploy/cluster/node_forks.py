"""Forks on the nodes of a cluster that one has joined: what Ray is asked to start the actors of a run by.

    bash takes the node's own Python ─▶ fork_request.py asks the run's server on that node, or starts one ─▶ it forks

A node need have none of it: without that file, or without an answer, an actor starts as ever.
"""

from __future__ import annotations

import secrets
import shlex
import sys
from functools import cache
from typing import Any

import ray
from ray.util.client import ray as client

from deploy.cluster.forkserver import REQUEST, may_fork
from swarm.run_config import RunConfig

# Its raylet was told which Python its workers have; the driver's, $0, may not be there, or not have Ray there
START = """
while IFS= read -rd '' word; do
    case $word in --python_worker_command=*) python=${word#*=} python=${python%% *};; esac
done </proc/$PPID/cmdline
[ -x "$python" ] || python=$0
if [ -r "$1" ]; then exec "$python" -IS "$@"; fi
shift 2
exec "$python" "$@"
"""
NEUTRAL = {"env_vars", "working_dir", "py_modules", "excludes", "config", "_ray_commit", "_ray_release"}


def node_forks(config: RunConfig) -> dict[str, Any]:
    """What belongs to the runtime environment of an actor, so that it is forked.

    Nothing where the job's own says what starts its workers: another Python, a container, or forks of a local cluster.
    """
    if not may_fork(config) or client.is_connected() or ray.get_runtime_context().runtime_env.keys() - NEUTRAL:
        return {}
    return {"py_executable": shlex.join(["bash", "-c", START, sys.executable, str(REQUEST), f"@{_run()}"])}


@cache
def _run() -> str:
    """A name for the servers of this driver: another one's may have imported what has changed since."""
    return secrets.token_hex(8)
