"""Connect to a Ray cluster within a time limit, without Ray's log output."""

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
#: A program that connects to a cluster and prints why it cannot.
PROBE = f"""
import os, sys, ray
try:
    ray.init(address=sys.argv[1], **{QUIET!r})
except Exception as error:
    print(error)
    sys.exit(3)
os._exit(0)
"""
#: Ray's message if there is no cluster.
NONE_RUNNING = "Could not find any running Ray instance"
#: Seconds between two attempts to connect.
AGAIN = 0.5
HINT = (
    "Set --ray_address to the HOST:PORT that `ray start --head` has shown, on a machine of the cluster "
    "(`--ray_address local` uses this machine alone); --ray_timeout waits longer."
)


@contextmanager
def reached(address: str | None, limit: float) -> Iterator[None]:
    """Connect to a cluster for the duration of the context.

    Args:
        address: ``HOST:PORT``, or ``local`` for a new cluster on this machine; None: RAY_ADDRESS, else the cluster that
            this machine is part of, else a new one. Ignored if this process is already connected.
        limit: Seconds to wait.

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
    # Failures of nodes are reported by our own errors. Ray has no public switch for its messages about them.
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
    """Restore the SIGTERM handler: Ray's raises an exception, which would discard what the next run could resume."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _find(address: str | None, limit: float) -> str:
    """The address of a cluster that was just probed; ``local`` if there is no cluster."""
    if address == "local":
        return address
    asked = address or os.environ.get("RAY_ADDRESS")
    name = f"The Ray cluster at {asked}" if asked else "The Ray cluster of this machine"
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
    """Wait until the address accepts TCP connections: Ray itself would wait for minutes."""
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
    """Connect in a subprocess: None on success, else Ray's error message, empty after a timeout.

    Ray has no time limit for connecting, and may terminate the process that tries.
    """
    command = [sys.executable, "-W", "ignore", "-c", PROBE, address]
    try:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return ""
    said = found.stdout.decode(errors="replace").strip()
    return (said or f"Ray ended with status {found.returncode}") if found.returncode else None
