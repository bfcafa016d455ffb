"""Strategies of hypothesis that damage JSON and YAML documents, in their structure or in their bytes."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import tracemalloc
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

#: Multiplies the number of cases: FUZZ=50 pytest tests/test_fuzz.py
EFFORT = int(os.environ.get("FUZZ", "1"))
SECONDS = 30
BYTES = 100_000_000

#: Values that readers must handle anywhere in a document.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308,
    1e400, -1e400, math.nan, "", " ", "\0", "a\0b", "\ud800", "\udcff", "..", ".", "/", "../x", "/etc/passwd", "~",
    "C:\\x", "%s{}", "[bold]", "\x1b[2J", "\r\n", "a" * 5000, "NaN", "1e999", "0x10", "5GB", "١", "float32", [], {},
    [[]], [None], {"": None}, ["a", "a"], [1.5, "x", None], {"a": {"b": []}}, [0] * 3000,
]  # fmt: skip
#: Bytes that parsers must handle anywhere in a file.
PIECES = [
    b"{", b"}", b"[", b"]" * 50, b"[" * 2000, b'"', b",", b":", b"\\u0000", b"\\ud800", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"9" * 5000, b"&a ", b"*a", b"!!python/name:os.system ", b"<<: *a", b"? ", b"---\n", b"1e5", b"NaN", b"\n", b"\t",
    b"#", b"- ", b": ", b"0x" + b"f" * 5000, b"2020-01-01", b"|\n",
]  # fmt: skip


def _paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries, at any depth."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*path, key))


def _nested(depth: int, by: str) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = {by: found} if by else [found]
    return found


@st.composite
def structures(draw: st.DrawFn, document: Any) -> Any:
    """The document with a few entries replaced, removed, renamed, moved or nested."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(document))
        if not paths:
            break
        *path, key = draw(st.sampled_from(paths))
        parent = document
        for step in path:
            parent = parent[step]
        what = draw(st.sampled_from(["value", "value", "value", "other", "remove", "rename", "nest", "any"]))
        if what == "value":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "other":
            *others, last = draw(st.sampled_from(paths))
            source = document
            with contextlib.suppress(KeyError, IndexError, TypeError):
                for step in others:
                    source = source[step]
                parent[key] = copy.deepcopy(source[last])
        elif what == "remove":
            del parent[key]
        elif what == "rename" and isinstance(parent, dict):
            texts = [value for value in VALUES if isinstance(value, str)]
            parent[draw(st.sampled_from([*texts, str(key).upper(), f"{key} "]))] = parent.pop(key)
        elif what == "nest":
            parent[key] = _nested(draw(st.sampled_from([1, 50, 400])), draw(st.sampled_from(["", "a", str(key)])))
        else:
            parent[key] = draw(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                                            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                                            max_leaves=5))  # fmt: skip
    return document


@st.composite
def texts(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with some changed, repeated, removed or inserted, or with a byte order mark."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(damaged)))
        what = draw(st.sampled_from(["set", "cut", "end", "put", "twice"]))
        if what == "set" and at < len(damaged):
            damaged[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del damaged[at : at + draw(st.integers(1, 40))]
        elif what == "end":
            del damaged[at:]
        elif what == "put":
            damaged[at:at] = draw(st.sampled_from(PIECES))
        else:
            end = min(len(damaged), at + draw(st.integers(1, 80)))
            damaged[at:at] = damaged[at:end]
    mark = draw(st.sampled_from([b"", b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]))
    return mark + bytes(damaged)


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    """Damaged JSON files of a document."""

    def encode(damaged: Any) -> bytes:
        return json.dumps(damaged, ensure_ascii=True).encode()

    whole = encode(document)
    return st.one_of(structures(document).map(encode), texts(whole), structures(document).map(encode).flatmap(texts))


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fail if the block takes more than SECONDS, or BYTES of memory."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{what} takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < BYTES, f"{what} takes much memory"
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
