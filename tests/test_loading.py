"""Kernels are compiled once on a machine; from then on their machine code is all that is needed."""

from __future__ import annotations

import json
import os
import pickle
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from modelfuse.kernels.jit import code_cache, linking
from modelfuse.kernels.jit import compile as compiling
from modelfuse.kernels.jit.code_cache import NotLaidOut, prepare
from modelfuse.kernels.jit.compile import CompiledFunction, announcing
from modelfuse.kernels.jit.linking import is_library


class Pair(NamedTuple):
    values: np.ndarray
    factor: float


def weigh(pair: Pair, grid: np.ndarray, start: int, key: Any, halve: bool, small: Any, out: np.ndarray) -> int:
    for i in range(pair.values.size):
        total = 0.0
        for j in range(grid.shape[1]):
            total += grid[i, j]
        value = (np.float64(pair.values[i]) * pair.factor + total + start) * np.float64(small)
        out[i] = value / 2 if halve else value
    return start - np.int64(key & np.uint64(0xFF))  # type: ignore[return-value]  # numba's integers


def is_large(values: np.ndarray) -> bool:
    return values.size > 3


def allocate(values: np.ndarray) -> None:
    beside = np.zeros(values.size)
    for i in range(values.size):
        beside[values.size - 1 - i] = values[i]
    for i in range(values.size):
        values[i] = beside[i]


def arguments() -> tuple[Any, ...]:
    pair = Pair(np.arange(4, dtype=np.float32), 0.1)
    grid = np.arange(24.0).reshape(4, 6)[:, ::2]  # With gaps.
    return pair, grid, -7, np.uint64(2**64 - 3), True, np.float32(0.3), np.empty(4)


@pytest.fixture(autouse=True)
def _own_key() -> Iterator[None]:
    """What the code of a test depends on is not taken for what that of the next one does; after all is put back."""
    yield
    code_cache._key.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where machine code is kept."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    code_cache._key.cache_clear()
    yield tmp_path / "modelfuse"
    code_cache._key.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled, in order."""
    symbols: list[str] = []
    export = compiling._export

    def watched(dispatcher: Any, symbol: str, arguments: tuple[Any, ...]) -> bytes:
        symbols.append(symbol)
        return export(dispatcher, symbol, arguments)

    monkeypatch.setattr(compiling, "_export", watched)
    return symbols


def run(kernel: Callable[..., int]) -> tuple[int, list[float]]:
    given = arguments()
    return int(kernel(*given)), given[-1].tolist()


def test_a_kernel_is_compiled_once_and_loaded_from_then_on(folder: Path, compiled: list[str]) -> None:
    expected = run(weigh)
    assert run(CompiledFunction(weigh)) == expected
    assert run(CompiledFunction(weigh)) == expected
    assert len(compiled) == len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("folder")
def test_that_kernels_are_compiled_is_said_once() -> None:
    said: list[str] = []

    def use(who: str) -> None:
        with announcing(lambda sentence: said.append(f"{who}: {sentence}")):
            run(CompiledFunction(weigh))
            CompiledFunction(is_large)(np.zeros(3))

    use("one")
    use("another")
    assert said == [f"one: {compiling.COMPILING}"]
    CompiledFunction(is_large)(np.zeros(3, np.int8))
    assert len(said) == 1  # Nobody asks any more.


def test_arguments_of_another_kind_are_another_kernel(folder: Path, compiled: list[str]) -> None:
    kernel = CompiledFunction(is_large)
    assert [kernel(np.zeros(size, dtype)) for size in (3, 4) for dtype in (np.float32, np.int8)] == [
        False, False, True, True,
    ]  # fmt: skip
    assert kernel(np.zeros(8, np.int8)[::2]) is True
    assert len(compiled) == 3


def test_prepared_arguments_are_those_they_stand_for(folder: Path) -> None:
    given = arguments()
    kernel = CompiledFunction(weigh)
    assert kernel(*map(prepare, given)) == run(weigh)[0]
    assert given[-1].tolist() == run(weigh)[1]
    with pytest.raises(NotLaidOut):
        prepare("text")


def test_what_is_laid_out_has_its_own_addresses_in_another_process() -> None:
    """A pass travels to the nodes of a cluster with its tables."""
    laid = prepare((np.arange(5), 2.5))
    again = pickle.loads(pickle.dumps(laid))
    assert again.kind == laid.kind
    assert again.words == prepare(again.value).words != laid.words
    assert again.value[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:99] + b"x" + data[100:], lambda _: b""])
def test_a_damaged_file_is_compiled_again(folder: Path, compiled: list[str], damage: Callable[[bytes], bytes]) -> None:
    run(CompiledFunction(weigh))
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert run(CompiledFunction(weigh)) == run(weigh)
    assert len(compiled) == 2
    run(CompiledFunction(weigh))
    assert len(compiled) == 2


def test_what_older_sources_gave_is_replaced(
    folder: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(CompiledFunction(weigh))
    (tmp_path / "package" / "kernels" / "compiled").mkdir(parents=True)
    (tmp_path / "package" / "kernels" / "compiled" / "merge_loops.py").write_text("newer")
    monkeypatch.setattr(code_cache, "PACKAGE", tmp_path / "package")
    code_cache._key.cache_clear()
    (before,) = folder.iterdir()
    run(CompiledFunction(weigh))
    assert len(compiled) == 2
    (after,) = folder.iterdir()
    assert before != after


def test_a_kernel_that_allocates_is_called_by_numba(folder: Path, compiled: list[str]) -> None:
    for _ in range(2):
        values = np.arange(5.0)
        CompiledFunction(allocate)(values)
        assert values.tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert len(compiled) == 1, "it is known from then on that numba is needed"


@pytest.mark.parametrize("what", ["_export", "find", "load", "keep"])
def test_other_releases_of_the_compiler_still_do_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("no longer there")

    monkeypatch.setattr(compiling if what == "_export" else code_cache, what, fail)
    assert run(CompiledFunction(weigh)) == run(weigh)


#: Whether machine code becomes shared libraries here.
LINKS = shutil.which("ld") is not None and hasattr(os, "memfd_create") and os.uname().machine == "x86_64"


@pytest.mark.skipif(not LINKS, reason="there is no linker that makes shared libraries of these objects")
def test_where_there_is_a_linker_the_system_loads_machine_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(CompiledFunction(weigh))
    (path,) = folder.iterdir()
    assert is_library(path.read_bytes()[code_cache._DIGEST_BYTES + 1 :])
    monkeypatch.setattr(code_cache, "engine", None)
    open_before = len(os.listdir("/proc/self/fd"))
    assert [run(CompiledFunction(weigh)) for _ in range(3)] == [expected] * 3
    assert len(os.listdir("/proc/self/fd")) == open_before + 3, "another path for each"


@pytest.mark.parametrize("missing", ["linker", "files in memory", "what it links"])
def test_without_a_linker_llvm_loads_machine_code(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "linker":
        monkeypatch.setattr(linking, "_LINK", (str(folder / "ld"),))
    elif missing == "what it links":
        monkeypatch.setattr(linking, "_LINK", ("true",))
    else:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    expected = run(CompiledFunction(weigh))
    (path,) = folder.iterdir()
    assert path.read_bytes()[code_cache._DIGEST_BYTES + 1 :].startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe", b"d\x86"))
    assert not is_library(path.read_bytes()[code_cache._DIGEST_BYTES + 1 :])
    monkeypatch.setattr(compiling, "_export", None)
    assert run(CompiledFunction(weigh)) == expected


def test_machine_code_is_for_one_kind_of_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(code_cache, "CPU_INFO", folder / "cpuinfo")

    def key(text: str) -> str:
        code_cache.CPU_INFO.write_text(text)
        code_cache._key.cache_clear()
        return code_cache._key()

    one = "processor\t: 0\nmodel\t\t: 2\nmodel name\t: one\ncpu MHz\t\t: {}\nflags\t\t: fpu avx {}\n\nprocessor\t: 1\n"
    arm = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40"
    texts = [
        one.format(2000, "avx2"),
        one.format(2000, ""),
        arm.format("sve"),
        arm.format(""),
        "processor\t: 0\n\n",
        "",
    ]
    keys = [key(text) for text in texts]
    assert len({*keys}) == len(keys) - 1
    assert keys[-1] == keys[-2], "LLVM says what it is"
    assert key(one.format(3000, "avx2")) == keys[0]


def test_without_a_folder_to_write_to(folder: Path, compiled: list[str]) -> None:
    folder.write_text("in the way")
    assert run(CompiledFunction(weigh)) == run(weigh)
    assert len(compiled) == 1


# Nobody else's code


def kept(folder: Path) -> Path:
    """The one file of machine code."""
    run(CompiledFunction(weigh))
    (path,) = folder.iterdir()
    return path


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody else owned it: only root could give it away."""
    own, look, look_at = path.stat(), os.fstat, os.lstat

    def changed(status: os.stat_result) -> os.stat_result:
        if not os.path.samestat(status, own):
            return status
        return os.stat_result([*status[:4], 4711, *status[5:10]])

    monkeypatch.setattr(os, "fstat", lambda descriptor: changed(look(descriptor)))
    monkeypatch.setattr(os, "lstat", lambda path, **more: changed(look_at(path, **more)))


def test_folders_and_files_are_for_one_user_whatever_the_umask(folder: Path, compiled: list[str]) -> None:
    before = os.umask(0)
    try:
        path = kept(folder)
        CompiledFunction(allocate)(np.arange(5.0))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "numba").stat().st_mode) == 0o700


@pytest.mark.parametrize("which", ["file", "folder", "parent"])
@pytest.mark.parametrize("by", ["group", "everybody", "owner"])
def test_what_others_could_have_written_is_not_loaded(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, which: str, by: str
) -> None:
    path = kept(folder)
    changed = {"file": path, "folder": folder, "parent": folder.parent}[which]
    if by == "owner":
        of_another_user(changed, monkeypatch)
    else:
        changed.chmod(changed.stat().st_mode | {"group": 0o020, "everybody": 0o002}[by])
    assert code_cache.find(compiled[0]) is None
    assert run(CompiledFunction(weigh)) == run(weigh)
    assert len(compiled) == 2


def test_links_to_machine_code_are_not_followed(folder: Path, compiled: list[str], tmp_path: Path) -> None:
    path = kept(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert code_cache.find(compiled[0]) is None
    path.unlink()
    os.mkfifo(path)
    assert code_cache.find(compiled[0]) is None


def test_numba_keeps_nothing_where_others_may_write(folder: Path, tmp_path: Path) -> None:
    """It runs whatever it finds in its cache."""
    tmp_path.chmod(0o777)
    values = np.arange(5.0)
    CompiledFunction(allocate)(values)
    assert values.tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert os.listdir(tmp_path) == []


def test_root_uses_no_other_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``sudo -E``."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(code_cache, "PACKAGE", tmp_path / "none")
    home, own = tmp_path / "home", tmp_path / "root"
    for each in (home, own, tmp_path / "none"):
        each.mkdir()
    (tmp_path / "none").chmod(0o777)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_dir=str(own)))
    of_another_user(home, monkeypatch)
    code_cache.keep("symbol", b"n")
    assert not list(home.iterdir())
    assert len(list((own / ".cache" / "modelfuse").iterdir())) == 1
    assert code_cache.find("symbol") == b"n"


CODE = """
import json, sys
import numpy as np
from modelfuse.dtypes import BF16
from modelfuse.kernels import Work
from modelfuse.kernels.compiled.base_distance import measured
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.methods.registry import METHODS, apply

size, results = 5000, {}
draw = np.random.default_rng(0)
raws = (draw.standard_normal((3, size)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
for name, method in METHODS.items():
    applied = apply(method.sparsifier, method.combination, (0.5, 0.5), method.defaults)
    work = Work("w", size, (BF16,) * 3, True, BF16, applied)
    out, procedure = np.zeros(2 * size, np.uint8), merge_procedure(work)
    procedure = measured(procedure, work)
    pass_ = next(procedure)
    try:
        while True:
            state = pass_.start()
            pass_.apply(state, 0, size, raws, out)
            pass_ = procedure.send([pass_.finish(state)])
    except StopIteration:
        results[name] = out.tobytes().hex()
loaded = {"numba": "numba" in sys.modules, "llvm": "llvmlite.binding" in sys.modules}
print(json.dumps({**loaded, "results": results}))
"""


def test_the_second_process_of_any_method_loads_no_compiler(tmp_path: Path) -> None:
    def process(**env: str) -> Any:
        command = [sys.executable, "-W", "error", "-c", CODE]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first, second = (process(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first["numba"]
    assert not second["numba"]
    assert second["llvm"] != LINKS
    assert first["results"] == second["results"]


def test_a_moved_folder_is_found_again(
    folder: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an image's, which a container has elsewhere."""
    run(CompiledFunction(weigh))
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "modelfuse")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "elsewhere"))
    code_cache._key.cache_clear()
    run(CompiledFunction(weigh))
    assert len(compiled) == 1


def test_a_kernel_that_is_not_cached_is_not_looked_for_at_every_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reading the cache costs more than what a small tensor's kernel does; what another process compiles is found."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    looked, now = list[str](), [0.0]
    monkeypatch.setattr(compiling, "monotonic", lambda: now[0])
    monkeypatch.setattr(code_cache, "find", lambda symbol: looked.append(symbol))
    kernel = CompiledFunction(lambda x: x * 3, plain=lambda x: x * 2)
    with compiling.compiling(False):
        assert [kernel(1.5) for _ in range(5)] == [3.0] * 5
        assert len(looked) == 1
        now[0] += compiling.LOOKED_UP_EVERY
        assert kernel(1.5) == 3.0
        assert len(looked) == 2
