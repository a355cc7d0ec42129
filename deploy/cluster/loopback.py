"""A Ray cluster of one's own that nobody else reaches: it listens on the loopback interface, and wants a token.

Ray 2.60 rewrites 127.0.0.1 to the machine's outward address and then listens on every interface, unless it is told
that there are no clusters here. The token keeps out this machine's other users, who reach the loopback interface too.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray
from ray._private import node, parameter, ray_constants
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

from deploy.cluster.placement import OwnCluster

ADDRESS, INTERFACE = "127.0.0.1", "lo"
QUIET = logging.WARNING  # else Ray says that it has started, or that it joins a cluster, which nobody asked for
SETUP = str(Path(__file__).with_name("worker_setup.py"))  # Ray joins it to its folder: an absolute path stays


@contextmanager
def loopback(token: str | None = None) -> Generator[str]:
    """Settings for `start_head`, which Ray's processes inherit, or to `join_head` what has `token`; as before at the end."""
    token = token or secrets.token_hex(32)
    settings = {
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "RAY_prestart_worker_first_driver": "0",  # of no use: an actor's environment is its own
        "RAY_task_events_report_interval_ms": "0",  # a record of each call, which nobody can read without a dashboard
    }
    before = {name: os.environ.get(name) for name in settings}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(settings)
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read its variable when it was imported
    _read_again()
    try:
        yield token
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _read_again()


def start_head(size: OwnCluster, environment: Mapping[str, str] | None = None, forks: bool = False) -> str:
    """A head with its node, within `loopback`, which ends with this process; its address. `forks`: of `worker_setup`."""
    if forks:
        ray_constants.SETUP_WORKER_FILENAME = SETUP  # pyright: ignore[reportAttributeAccessIssue]
    with _without_helpers():
        ray.init(
            address="local",  # else Ray joins any cluster that it finds on this machine, or that RAY_ADDRESS names
            num_cpus=size.cpus,
            resources=dict.fromkeys(size.tags, 1.0),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=QUIET,
            runtime_env=dict(environment or {}),
            _node_ip_address=ADDRESS,
        )
    return ray.get_runtime_context().gcs_address


def join_head(address: str, environment: Mapping[str, str]) -> None:
    """What `start_head` has made, within the `loopback` of its token."""
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=QUIET,
        runtime_env=dict(environment),
        _node_ip_address=ADDRESS,
    )


@contextmanager
def _without_helpers() -> Generator[None]:
    """A local `ray.init` within it starts none of what nobody asks here: the autoscaler, the reader of the workers' logs
    and the head of the dashboard, which without one only reports usage. Two seconds of a core, and processes."""
    plain, start = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = partial(plain, no_monitor=True, include_log_monitor=False)  # pyright: ignore
    node.Node.start_api_server = lambda self, **_: None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = plain, start


def _read_again() -> None:
    """Ray's C++ side keeps the mode and the token that it read first."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
