"""The programs that are timed: the plain copy, modelfuse, and two peers; and the folder that they work in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from works import Work, arcee_recipe, modelfuse_command, paddle_settings

HERE = Path(__file__).resolve().parent
COPY = "copy"
MODELFUSE = "modelfuse"
#: For each peer, the arguments of successive calls of pip. torch is first, so that its version is this one.
PEERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "arcee": (("torch==2.13.0",), ("mergekit==0.1.5",)),
    "paddle": (("paddlepaddle==3.3.1",), ("paddleformers==1.2.0",)),
}
#: For each peer, a module that is imported once before anything is timed.
PEER_MODULES = {"arcee": "mergekit.merge", "paddle": "paddleformers.mergekit.merge_model"}


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder of a benchmark's files."""

    work: Path

    @property
    def reference(self) -> Path:
        """The input checkpoints."""
        return self.work / "reference"

    @property
    def output(self) -> Path:
        """The output of the current run; it is removed afterwards."""
        return self.work / "output"

    @property
    def log(self) -> Path:
        """What the current run prints."""
        return self.work / "output.log"

    def peer_python(self, peer: str) -> Path:
        """The interpreter of the environment that ``install_peer`` creates."""
        return self.work / "peers" / peer / "bin" / "python"


@contextmanager
def workspace(folder: str | Path | None) -> Iterator[Workspace]:
    """A workspace in a folder, which keeps its files, or in a temporary one."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Workspace(Path(folder).resolve())
        return
    with tempfile.TemporaryDirectory(prefix="modelfuse-benchmark-", ignore_cleanup_errors=True) as temporary:
        yield Workspace(Path(temporary).resolve())


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that performs a merge or its equivalent.

    Attributes:
        name: Its name in tables.
        command: Its command line for a merge.
        env: Environment variables that it needs.
    """

    name: str
    command: Callable[[Work], list[str]]
    env: dict[str, str] = field(default_factory=dict)


def copy_tool(space: Workspace, threads: int) -> Tool:
    """The plain copy of ``copying.py``."""

    def command(work: Work) -> list[str]:
        inputs = [path / "model.safetensors" for path in work.inputs(space.reference)]
        space.output.mkdir()
        return copy_command(space.output / "model.safetensors", threads, inputs)

    return Tool(COPY, command)


def copy_command(output: Path, threads: int, inputs: Iterable[Path]) -> list[str]:
    """The command line of ``copying.py``."""
    return [sys.executable, str(HERE / "copying.py"), str(output), str(threads), *map(str, inputs)]


def modelfuse_tool(space: Workspace, threads: int, extra: Iterable[str]) -> Tool:
    """The command line of modelfuse, with the interpreter that runs the benchmark."""

    def command(work: Work) -> list[str]:
        merge = modelfuse_command(sys.executable, work, space.reference, space.output, threads)
        return [*merge, *extra]

    # The source tree of this file is used, so modelfuse need not be installed.
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    # pip compiles bytecode when it installs a package; for a source tree, the warm-up run does.
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": ""}
    return Tool(MODELFUSE, command, env)


def peer_tool(peer: str, python: str, space: Workspace, threads: int) -> Tool:
    """A peer's command line, or a short script for one without."""

    def arcee(work: Work) -> list[str]:
        recipe = space.work / "arcee.yml"
        recipe.write_text(arcee_recipe(work, space.reference))
        options = ["--no-copy-tokenizer", "--quiet", "--num-threads", str(threads)]
        return [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(space.output), *options]

    def paddle(work: Work) -> list[str]:
        settings = paddle_settings(work, space.reference, space.output, threads)
        return [python, str(HERE / "peers" / "paddle_merge.py"), settings]

    return Tool(peer, {"arcee": arcee, "paddle": paddle}[peer])


def install_peer(peer: str, space: Workspace) -> None:
    """Create a virtual environment in the workspace and install a peer there, unless it is installed."""
    python = space.peer_python(peer)
    if python.exists() and importable(str(python), peer):
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])], check=True)
    for packages in PEERS[peer]:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def importable(python: str, peer: str) -> bool:
    """Whether an interpreter can import a peer; importing also reads its files into the page cache."""
    command = [python, "-c", f"import {PEER_MODULES[peer]}"]
    # In another folder, as a folder here could have the peer's name.
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, check=False, capture_output=True, cwd=elsewhere)
    return done.returncode == 0


def find_peer(peer: str, space: Workspace, given: str | None) -> str | None:
    """An interpreter that can import a peer: the given one, the one in the workspace, or this one; None if none can."""
    candidates = [given] if given else [str(space.peer_python(peer)), sys.executable]
    found = (each for each in candidates if os.path.exists(each) and importable(each, peer))
    return next(found, None)


def tensor_names(folder: Path) -> set[str]:
    """The tensor names in the headers of all safetensors files in a folder."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            names |= set(json.loads(file.read(length)))
    return names - {"__metadata__"}
