"""Whatever bytes a checkpoint is made of: nothing in it is run, and all that it can cause is an error."""

from __future__ import annotations

import ast
import builtins
import io
import itertools
import os
import pickle
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfuse.checkpoints.formats import paddle_reader, safe_unpickler, torch_pickle_types
from modelfuse.checkpoints.formats.byte_window import Window
from modelfuse.checkpoints.formats.paddle_reader import read_paddle
from modelfuse.checkpoints.formats.pickle_types import Builder, ByteRange, Refused, TextRange
from modelfuse.checkpoints.formats.safe_unpickler import PickleMachine
from modelfuse.checkpoints.formats.torch_reader import read_torch
from modelfuse.errors import CheckpointError
from modelfuse.storage.files import SourceFile

FIXTURES = Path(__file__).parent / "fixtures"
READERS = Path(safe_unpickler.__file__).parent
CHECKPOINTS = READERS.parent
#: What all of them read with.
FILES = CHECKPOINTS.parent / "storage" / "files.py"
MAGIC = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."


def in_zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", content)
        for number in range(3):
            archive.writestr(f"x/data/{number}", bytes(range(200)))
    return stream.getvalue()


def in_stream(content: bytes) -> bytes:
    return MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}." + content + b"\x80\x02]."


#: Every way in which a pickle gets to be read.
WAYS: dict[str, tuple[Callable[[bytes], bytes], Callable[[Path], Any]]] = {
    "paddle": (bytes, read_paddle),
    "torch zip": (in_zip, read_torch),
    "torch stream": (in_stream, read_torch),
}


@pytest.fixture(params=WAYS)
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], Any]:
    wrap, reader = WAYS[request.param]

    def read_pickle(content: bytes) -> Any:
        path = tmp_path / "model.bin"
        path.write_bytes(wrap(content))
        return reader(path)

    return read_pickle


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def attempt(path: Path, reader: Callable[[Path], Any]) -> None:
    try:
        for tensor in reader(path)[0].values():
            with tensor.open() as read:
                read(0, memoryview(bytearray(tensor.dtype.nbytes(min(tensor.size, 50)))))
    except CheckpointError as error:
        assert str(path) in str(error)


# Nothing is run

#: Events by which Python tells that something is executed, compiled, imported or started.
WATCHED = ("exec", "compile", "import", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system")
_happened: list[str] | None = None


def _watch(event: str, arguments: object) -> None:
    if _happened is not None and event.startswith((*WATCHED, "subprocess", "pickle", "ctypes", "socket")):
        _happened.append(event)


sys.addaudithook(_watch)


@pytest.fixture
def happened() -> Iterator[list[str]]:
    """The interpreter's own record of what was executed, compiled, imported or started."""
    global _happened
    events: list[str] = []
    _happened = events
    yield events
    _happened = None


class Call:
    """Pickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.reduced

    def __call__(self) -> None:
        """Only things that can be called may stand as the function of another call."""


def attacks() -> dict[str, object]:
    program = "open('SENTINEL', 'w').close()"
    inner = pickle.dumps(Call(os.system, "touch SENTINEL"))
    return {
        "system": Call(os.system, "touch SENTINEL"),
        "exec": Call(exec, program),
        "eval": Call(eval, program),
        "eval with names": Call(eval, program, {"data": np.ones(2)}),
        "eval in the list": [Call(eval, "[open('SENTINEL', 'w') for x in data]", {"data": np.ones(2)})],
        "eval of data with a space": Call(eval, "data ", {"data": np.ones(2)}),
        "eval of data without an array": Call(eval, "data", {"data": 1}),
        "eval with builtins": Call(eval, "data", {"data": np.ones(2), "__builtins__": {}}),
        "eval with locals": Call(eval, "data", {"data": np.ones(2)}, {}),
        "getattr": Call(getattr, "x", "upper"),
        "chain": Call(Call(getattr, Call(getattr, "x", "upper"), "__call__")),
        "import": Call(builtins.__import__, "antigravity"),
        "numpy load": Call(np.load, "SENTINEL", None, True),
        "nested pickle": Call(pickle.loads, inner),
        "open": Call(open, "SENTINEL", "w"),
        "compile": Call(compile, program, "", "exec"),
        "rot13": Call(__import__("codecs").encode, "data", "rot13"),
        "subclass": np.ma.masked_array([1.0, 2.0]),
        "matrix": np.ones(2).view(np.recarray),
        "an array of objects": np.array([Call(os.system, "touch SENTINEL")], dtype=object),
    }


def test_the_record_shows_what_python_itself_would_do(happened: list[str]) -> None:
    pickle.loads(pickle.dumps(Call(compile, "1", "", "eval")))
    assert {"pickle.find_class", "compile"} <= set(happened)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", attacks())
def test_attacks_are_refused_and_not_run(
    read: Callable[[bytes], Any],
    happened: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attack: str,
    protocol: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = attacks()[attack]
    for value in (evil, {"weight": evil}, {"note": [evil]}):
        content = pickle.dumps(value, protocol)
        happened.clear()
        with pytest.raises(CheckpointError, match=r"model\.bin"):
            read(content)
        assert happened == []
    assert not Path("SENTINEL").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system", "posix system", "builtins exec", "builtins getattr", "builtins eval ", " builtins eval",
        "torch.storage _load_from_bytes", "torch load", "torch _utils._rebuild_tensor_v2", "numpy load",
        "functools partial", "operator attrgetter", "types FunctionType", "copyreg _reconstructor",
        "numpy.core.multiarray _reconstruct.__globals__", "collections OrderedDict.__init__", "torch.jit load",
        "sys modules", "webbrowser open", "modelfuse.checkpoints read_config", "\u202eexec builtins",
    ],
)  # fmt: skip
def test_names_are_looked_up_nowhere(read: Callable[[bytes], Any], happened: list[str], name: str) -> None:
    module, _, attribute = name.rpartition(" ")
    texts = [text.encode() for text in (module, attribute)]
    stacked = b"".join(b"\x8c" + bytes([len(text)]) + text for text in texts) + b"\x93"
    for ask in (b"c" + b"\n".join(texts) + b"\n", stacked):
        with pytest.raises(CheckpointError) as error:
            read(b"\x80\x04" + ask + b"X\x02\x00\x00\x00id\x85R.")
        assert "never executes code" in str(error.value)
        if name.isascii():
            assert f"{module}.{attribute}" in str(error.value)
    assert happened == []


@pytest.mark.parametrize(("way", "known"), [("paddle", paddle_reader._KNOWN), ("torch zip", torch_pickle_types.KNOWN)])
def test_known_names_cannot_be_misused(tmp_path: Path, way: str, known: dict[str, object]) -> None:
    wrap, reader = WAYS[way]
    path = tmp_path / "model.bin"
    builders = [name for name, value in known.items() if isinstance(value, Builder)]
    for name in [*builders, *(known.keys() - builders)][: len(builders) + 3]:
        for arguments in (b")", b"N\x85", b"]}\x86", b"(NNNNNt", b"(tN)NNNN((ttt"):
            for call in (b"R", b"\x81", b"b", b"R(NNNNNtb", b"Q"):
                ask = b"\x80\x02}" + text("x") + b"c" + name.replace(" ", "\n").encode() + b"\n"
                path.write_bytes(wrap(ask + arguments + call + b"s."))
                attempt(path, reader)


def test_the_readers_cannot_run_anything() -> None:
    """They import no unpickler, and do not use what could turn a name into a function."""
    paths = {*READERS.glob("*.py"), *(CHECKPOINTS / "views").glob("*.py"), CHECKPOINTS / "tensors.py", FILES}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                forbidden = {"eval", "exec", "compile", "getattr", "setattr", "globals", "__import__", "vars"}
                assert node.id not in forbidden, (path.name, node.lineno)
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "importlib", "torch", "paddle", "subprocess", "ctypes"}, path.name


# Nothing is unbounded


def test_tensors_whose_hashes_are_all_the_same(tmp_path: Path) -> None:
    """Numbers that differ by a multiple of Python's prime have one hash; looked up by it, they took minutes."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little")

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
    body = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00" + storage + b"q\x0100}("
    sizes = itertools.islice(itertools.product((1, 2**61, 2**62 - 1), repeat=9), 8000)
    for at, shape in enumerate(sizes):
        dimensions, strides = b"".join(map(number, shape)), b"K\x01" * len(shape)
        body += text(f"{at:x}") + b"h\x00(h\x01K\x00(" + dimensions + b"t(" + strides + b"t\x89N}tR"
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, content in (("data.pkl", body + b"u."), ("byteorder", b"little"), ("data/0", bytes(64))):
            archive.writestr(f"x/{name}", content)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="claims the shape"):
        read_torch(tmp_path / "x.bin")
    assert time.process_time() - started < 3


def test_very_many_names_are_refused(tmp_path: Path) -> None:
    pairs = b"".join(b"\x8c\x05" + f"{number:05x}".encode() + b"K\x00" for number in range(260_000))
    (tmp_path / "x.pdparams").write_bytes(b"\x80\x02}(" + pairs + b"u.")
    with pytest.raises(CheckpointError, match="more than 250,000"):
        read_paddle(tmp_path / "x.pdparams")


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + (1 << 40).to_bytes(8, "little"),
        b"\x8e" + b"\xff" * 8,
        b"\x96" + (1 << 62).to_bytes(8, "little"),
        b"\x8d" + (1 << 40).to_bytes(8, "little"),
        b"B\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\xff" * 255,
        b"\x95" + b"\xff" * 8,
        b"r\xff\xff\xff\xff",
        b"Nr\xff\xff\xff\xff0j\xff\xff\xff\x7f",
        b"c" + b"a" * 30_000,
        b"(" * 30_000,
        b"cbuiltins\neval\n" * 3,
    ],
    ids=repr,
)
def test_claims_take_no_memory(read: Callable[[bytes], Any], content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read(b"\x80\x04" + content + b".")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limit", "content"),
    [
        ("MAX_OPCODES", b"N0" * 6_000 + b"N"),
        ("MAX_STACK", b"N" * 6_000),
        ("MAX_MARKS", b"(" * 6_000),
        ("MAX_LITERAL_TOTAL", text("x" * 1000) * 6),
    ],
)
def test_limits(read: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch, limit: str, content: bytes) -> None:
    monkeypatch.setattr(safe_unpickler, limit, 5_000)
    with pytest.raises(CheckpointError, match="more than 5,000"):
        read(b"\x80\x02" + content + b".")


@pytest.mark.parametrize(
    "content",
    [
        b")" + b"\x85" * 60_000,
        b"]\x94" + b"h\x00\x85" * 30_000,
        b"]" * 30_000 + b"a" * 29_999,
        b"}" + text("a") * 20_000,
        (b"}" + text("a")) * 20_000 + b"N" + b"s" * 20_000,
        b"cbuiltins\nset\n\x94" + b"h\x00" * 20_000 + b")R" + b"\x85R" * 20_000,
        b")" + b"2\x86" * 30_000,
        b"]\x94h\x00a",
        b"}\x94" + text("a") + b"h\x00s",
        b"}" + text("a") + b"]\x94" + b"h\x00a" * 30_000 + b"s",
        b"](" + b")" * 30_000 + b"e",
        b"}(" + b"".join(text(f"k{number}") + b"N" for number in range(20_000)) + b"u",
    ],
    ids=range(12),
)
def test_depth_sharing_and_cycles_are_harmless(read: Callable[[bytes], Any], content: bytes) -> None:
    for value in (content, b"}" + text("x") + content + b"s"):
        try:
            read(b"\x80\x04" + value + b".")
        except CheckpointError:
            pass


def test_keys_that_would_collide_are_refused(read: Callable[[bytes], Any]) -> None:
    """Their hashes are all equal, and a dict of them would take quadratic time."""
    for key in (
        b"\x8a\x0a" + (2**61 - 1 << 8).to_bytes(10, "little"),
        b")",
        b"N\x85",
        b"G?\xf0" + bytes(6),
        b"]",
        b"C\x01a",
    ):
        with pytest.raises(CheckpointError, match="as a key"):
            read(b"\x80\x04}" + key + b"Ns.")


def test_shapes_beyond_all_files(tmp_path: Path) -> None:
    """A stride of zero makes a tensor as large as its shape says, whatever its storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    large = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    for size, stride in (
        (large * 2, b"K\x00K\x00"), (large, b"K\x01"), (b"K\x02", large), (b"J\xff\xff\xff\xff", b"K\x01"),
        (b"K\x02", b"J\xff\xff\xff\xff"), (b"K\x02", b""), (b"K\x01" * 40, b"K\x01" * 40), (b"N", b"N"),
        (b"G" + bytes(8), b"K\x01"), (b"\x88", b"K\x01"), (b"K\x33", b"K\x01"),
    ):  # fmt: skip
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(" + size + b"t(" + stride + b"t"
        path = tmp_path / "x.bin"
        path.write_bytes(in_zip(b"\x80\x02}" + text("w") + tensor + b"\x89}tRs."))
        with pytest.raises(CheckpointError):
            read_torch(path)


# Random bytes


SEEDS = sorted([*FIXTURES.glob("paddle/*.pdparams"), *FIXTURES.glob("torch/*.bin")])
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(seed=st.sampled_from(SEEDS), changes=edits)
def test_damaged_files(
    tmp_path_factory: pytest.TempPathFactory, seed: Path, changes: list[tuple[float, int, bytes]]
) -> None:
    content = seed.read_bytes()
    for where, removed, added in changes:
        at = int(where * len(content))
        content = content[:at] + added + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / f"damaged{seed.suffix}"
    path.write_bytes(content)
    attempt(path, read_torch if seed.suffix == ".bin" else read_paddle)


with zipfile.ZipFile(FIXTURES / "torch" / "zip.bin") as _archive:
    PICKLE = _archive.read("zip/data.pkl")
KNOWN = sorted(set(torch_pickle_types.KNOWN) | set(paddle_reader._KNOWN))
opcodes = st.one_of(
    st.sampled_from([bytes([code]) for code in b"N\x88\x89)]}(0122tae\x85\x86\x87su\x90\x91RR\x81bQ\x93\x94\x8f"]),
    st.sampled_from(KNOWN).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n"),
    st.sampled_from(["data", "f4", "<", "C", "latin1", "storage", "cpu", "0", "é"]).map(text),
    st.integers(0, 255).map(lambda number: b"K" + bytes([number])),
    st.integers(0, 6).map(lambda number: b"h" + bytes([number])),
    st.binary(max_size=16).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: b"\x8a\x08" + n.to_bytes(8, "little", signed=True)),
    st.tuples(st.integers(0, len(PICKLE)), st.integers(1, 60)).map(lambda cut: PICKLE[cut[0] : sum(cut)]),
    st.binary(max_size=3),
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(opcodes, max_size=40))
def test_random_programs(tmp_path_factory: pytest.TempPathFactory, way: str, parts: list[bytes]) -> None:
    wrap, reader = WAYS[way]
    path = tmp_path_factory.getbasetemp() / "program"
    path.write_bytes(wrap(b"\x80\x04" + b"".join(parts) + b"."))
    attempt(path, reader)


# The interpreter agrees with Python's on what it does read

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**120), 2**120) | st.floats(allow_nan=False) | st.text(),
    lambda items: (
        st.lists(items) | st.tuples(items) | st.dictionaries(st.text() | st.integers(-9, 9) | st.none(), items)
    ),
)


@settings(max_examples=150, deadline=None)
@given(value=plain, protocol=st.integers(2, 5))
def test_plain_values_are_read_as_python_does(
    tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain"
    path.write_bytes(b"before" + pickle.dumps(value, protocol) + b"after")
    file = SourceFile.at(path)
    with file.open() as opened:
        window = Window(opened, 6)
        assert PickleMachine(window, {}).load() == value
        assert window.take(5) == b"after"


def test_long_strings_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    value = [b"a" * 3, b"b" * 5000, "c" * 5000, bytearray(b"d" * 9)]
    path.write_bytes(pickle.dumps(value, 5))
    whole = path.read_bytes()
    file = SourceFile.at(path)
    with file.open() as opened:
        spans = PickleMachine(Window(opened), {}).load()
    assert isinstance(spans, list)
    assert [type(span) for span in spans] == [ByteRange, ByteRange, TextRange, ByteRange]
    for span, original in zip(spans, value, strict=True):
        expected = original.encode() if isinstance(original, str) else original
        assert whole[span.offset : span.offset + span.length] == expected


def test_without_persistent_ids_or_names_they_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, why in ((b"\x80\x02K\x01Q.", "persistent"), (b"\x80\x02cos\nsystem\n.", "os.system")):
        path.write_bytes(content)
        file = SourceFile.at(path)
        with file.open() as opened, pytest.raises(Refused, match=why):
            PickleMachine(Window(opened), {}).load()
