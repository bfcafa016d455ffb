"""The programs that are timed: the plain copy, modelfuse, and two peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from works import Work, arcee_recipe, modelfuse_command, paddle_settings

HERE = Path(__file__).resolve().parent
COPY = "copy"
MODELFUSE = "modelfuse"
#: Peer → what pip installs for it, one call a line. torch goes first so that its version is this one.
PEERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "arcee": (("torch==2.13.0",), ("mergekit==0.1.5",)),
    "paddle": (("paddlepaddle==3.3.1",), ("paddleformers==1.2.0",)),
}
#: Peer → the module that must be importable, and is imported once before anything is timed.
PEER_MODULES = {"arcee": "mergekit.merge", "paddle": "paddleformers.mergekit.merge_model"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark keeps its files."""

    work: Path

    @property
    def reference(self) -> Path:
        """The input checkpoints."""
        return self.work / "reference"

    @property
    def output(self) -> Path:
        """What the run in progress writes; removed after it."""
        return self.work / "output"

    @property
    def log(self) -> Path:
        """What the run in progress prints."""
        return self.work / "output.log"

    def peer_python(self, peer: str) -> Path:
        """The interpreter that ``install_peer`` makes."""
        return self.work / "peers" / peer / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that does a work.

    Attributes:
        name: As it stands in the tables.
        command: Its command line for one work.
        env: Variables that it needs.
    """

    name: str
    command: Callable[[Work], list[str]]
    env: dict[str, str] = field(default_factory=dict)


def copy_tool(place: Place, threads: int) -> Tool:
    """The plain copy, see ``copying.py``."""

    def command(work: Work) -> list[str]:
        inputs = [path / "model.safetensors" for path in work.inputs(place.reference)]
        place.output.mkdir()
        return copy_command(place.output / "model.safetensors", threads, inputs)

    return Tool(COPY, command)


def copy_command(output: Path, threads: int, inputs: Iterable[Path]) -> list[str]:
    """The command line of ``copying.py``."""
    return [sys.executable, str(HERE / "copying.py"), str(output), str(threads), *map(str, inputs)]


def modelfuse_tool(place: Place, threads: int, extra: Iterable[str]) -> Tool:
    """modelfuse by its command line, with the interpreter that runs the benchmark."""

    def command(work: Work) -> list[str]:
        merge = modelfuse_command(sys.executable, work, place.reference, place.output, threads)
        return [*merge, *extra]

    # modelfuse need not be installed: the source tree that this file lies in will do.
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    # Installing it, pip compiles what Python is to run; of a source tree, that is done by the warm-up.
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": ""}
    return Tool(MODELFUSE, command, env)


def peer_tool(peer: str, python: str, place: Place, threads: int) -> Tool:
    """A peer by its command line, or by the few lines that start it where it has none."""

    def arcee(work: Work) -> list[str]:
        recipe = place.work / "arcee.yml"
        recipe.write_text(arcee_recipe(work, place.reference))
        options = ["--no-copy-tokenizer", "--quiet", "--num-threads", str(threads)]
        return [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(place.output), *options]

    def paddle(work: Work) -> list[str]:
        settings = paddle_settings(work, place.reference, place.output, threads)
        return [python, str(HERE / "peers" / "paddle_merge.py"), settings]

    return Tool(peer, {"arcee": arcee, "paddle": paddle}[peer])


def install_peer(peer: str, place: Place) -> None:
    """Make a virtual environment under the work folder and install a peer there, once."""
    python = place.peer_python(peer)
    if python.exists() and importable(str(python), peer):
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])], check=True)
    for packages in PEERS[peer]:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def importable(python: str, peer: str) -> bool:
    """Whether an interpreter has a peer. Importing also brings its files into the page cache."""
    command = [python, "-c", f"import {PEER_MODULES[peer]}"]
    # Elsewhere than here: a folder named like the peer must not be taken for it.
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, check=False, capture_output=True, cwd=elsewhere)
    return done.returncode == 0


def find_peer(peer: str, place: Place, given: str | None) -> str | None:
    """The interpreter that has a peer: the one given, the one installed here, or this one."""
    candidates = [given] if given else [str(place.peer_python(peer)), sys.executable]
    found = (each for each in candidates if os.path.exists(each) and importable(each, peer))
    return next(found, None)


def tensor_names(folder: Path) -> set[str]:
    """The names in the headers of every safetensors file in a folder."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            names |= set(json.loads(file.read(length)))
    return names - {"__metadata__"}
