"""Where the ranks of a grid meet: a store on one address, which the first rank keeps."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def meeting(ip: str) -> tuple[TCPStore, str]:
    """Where the ranks of a grid meet, and its `ip:port`; whoever asks keeps the store until the grid is left.

    It listens before its port is told to anyone: a port that was only looked up may be taken by then. And on `ip`
    alone: left to itself torch listens on every interface, and whoever reaches the store can write to it.
    """
    listener = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
    port = listener.getsockname()[1]
    fd = listener.detach()  # the store's from now on
    store = TCPStore(ip, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    return store, f"{ip}:{port}"


def join(address: str, timeout: timedelta) -> TCPStore:
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timeout)
