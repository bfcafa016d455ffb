"""Reaching a Ray cluster within a time limit, quietly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from modelfuse.errors import ClusterError

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
#: Reaches a cluster in a process of its own, and says why that cannot be done.
PROBE = f"""
import os, sys, ray
try:
    ray.init(address=sys.argv[1], **{QUIET!r})
except Exception as error:
    print(error)
    sys.exit(3)
os._exit(0)
"""
#: How Ray says that there is no cluster to be found.
NONE_RUNNING = "Could not find any running Ray instance"
#: Seconds between two attempts to reach what refuses to be reached.
AGAIN = 0.5
HINT = (
    "Give the HOST:PORT that `ray start --head` has shown as --ray_address, on a machine of the cluster "
    "(`--ray_address local` uses this machine alone); --ray_timeout waits longer."
)


@contextmanager
def reached(address: str | None, limit: float) -> Iterator[None]:
    """Be connected to a cluster.

    Args:
        address: ``HOST:PORT``, or ``local`` for a new one on this machine; None: what RAY_ADDRESS says, else the one
            that this machine is in, else a new one. Of no account where this process is connected already.
        limit: Seconds to wait for it.

    Raises:
        ClusterError: If it cannot be reached in time.
    """
    if ray.is_initialized():
        yield
        return
    options = {**QUIET, "address": _find(address, limit)}
    if options["address"] == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options["include_dashboard"] = False
    # What happens to nodes is told by errors here. Ray has no public switch for its own words about them.
    before, ray._private.worker._worker_logs_enabled = ray._private.worker._worker_logs_enabled, False
    try:
        with _own_signals():
            ray.init(**options)
        yield
    except (ConnectionError, RuntimeError) as error:
        if ray.is_initialized():
            raise
        raise ClusterError(f"Ray cannot be started: {error}") from error
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = before


@contextmanager
def _own_signals() -> Iterator[None]:
    """Leave SIGTERM as it was: Ray makes an exception of it, which would undo what the next run could go on from."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _find(address: str | None, limit: float) -> str:
    """An address that was just reached; ``local`` if there is none to reach."""
    if address == "local":
        return address
    asked = address or os.environ.get("RAY_ADDRESS")
    name = f"The Ray cluster at {asked}" if asked else "The Ray cluster that this machine seems to be in"
    if asked and "://" in asked:
        raise ClusterError(f"RAY_ADDRESS is {asked}, but Ray's client cannot be used", HINT)
    end = time.monotonic() + limit
    if asked and asked != "auto":
        _knock(name, asked, limit)
    problem = _probe(asked or "auto", max(end - time.monotonic(), 0.1))
    if problem is None:
        return asked or "auto"
    if not asked and NONE_RUNNING in problem:
        return "local"
    raise ClusterError(f"{name} cannot be reached: {problem or f'it did not answer within {limit:g} s'}", HINT)


def _knock(name: str, address: str, limit: float) -> None:
    """Wait until somebody listens at an address: what Ray does without is to wait for minutes."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + limit
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), max(end - time.monotonic(), 0.1)):
                return
        except (OSError, OverflowError, ValueError) as error:
            if time.monotonic() + AGAIN > end or not isinstance(error, OSError) or isinstance(error, socket.gaierror):
                reason = getattr(error, "strerror", None) or error
                raise ClusterError(f"{name} cannot be reached within {limit:g} s: {reason}", HINT) from error
        time.sleep(AGAIN)


def _probe(address: str, limit: float) -> str | None:
    """None if a cluster was reached; else why not, empty if time was up.

    Ray cannot be told when to give up, and may end the process that it tries in.
    """
    command = [sys.executable, "-W", "ignore", "-c", PROBE, address]
    try:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return ""
    said = found.stdout.decode(errors="replace").strip()
    return (said or f"Ray ended with status {found.returncode}") if found.returncode else None
