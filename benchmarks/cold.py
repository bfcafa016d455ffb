"""Time merges whose inputs are not in the page cache, and a plain parallel read of the same bytes.

    python benchmarks/cold.py
    python benchmarks/cold.py --limit 500                # on a disk that reads 500 MB/s
    python benchmarks/cold.py --limit 400 --delay 5      # from a simulated server with a latency of 5 ms

README.md in this folder describes the method.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import reference
from levelling import level_memory
from measure import CommandFailed, Sample, measure
from pages import bring_in, evict, share
from programs import HERE, Tool, Workspace, copy_tool, modelfuse_tool, workspace
from rich.console import Console
from rich.table import Table
from run import SHAPES
from slow import distant, limited
from works import WORKS, Work

#: Candidates for the plain read, of which the fastest is used: threads, and bytes per block.
READS = (
    (1, 8 << 20),
    (2, 1 << 20),
    (2, 8 << 20),
    (4, 1 << 20),
    (8, 1 << 20),
    (8, 8 << 20),
    (16, 4 << 20),
    (32, 1 << 20),
)
#: Size of a file of another program that is in the page cache.
BYSTANDER_BYTES = 1 << 28
READ, COPY, COLD, WARM = "plain read", "copy", "cold merge", "warm merge"
HEADINGS = ("method", "read s", "copy s", "warm s", "cold s", "× read", "× copy", "inputs left", "others kept")


class DistantWorkspace(Workspace):
    """A workspace whose inputs are read from a simulated server."""

    @property
    def reference(self) -> Path:
        """The input checkpoints, below the server's mount point."""
        return self.work / "far"


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one method, medians over the rounds.

    Attributes:
        method: The method.
        read: Seconds of the plain read.
        copy: Seconds of a copy whose inputs are not in the page cache.
        warm: Seconds of a merge whose inputs are in the page cache.
        cold: Seconds of a merge whose inputs are not.
        to_read: Ratio of the cold merge's seconds to the plain read's in the same round.
        to_copy: Ratio to the copy's.
        inputs_left: The largest share of the inputs in the page cache after a cold merge.
        others_kept: The smallest share of another program's file there.
    """

    method: str
    read: float
    copy: float
    warm: float
    cold: float
    to_read: float
    to_copy: float
    inputs_left: float
    others_kept: float

    def cells(self) -> list[str]:
        """The row of a table."""
        seconds = [f"{each:.2f}" for each in (self.read, self.copy, self.warm, self.cold, self.to_read, self.to_copy)]
        return [self.method, *seconds, f"{self.inputs_left:.1%}", f"{self.others_kept:.1%}"]


class Bench:
    """Runs programs on inputs that are or are not in the page cache.

    Args:
        space: The workspace.
        threads: Threads of the copy and of modelfuse.
        before: Words that precede every command.
        words: Further arguments of modelfuse.
    """

    def __init__(self, space: Workspace, threads: int, before: Sequence[str], words: Sequence[str]) -> None:
        self.space, self.before = space, before
        self.copy, self.merge = copy_tool(space, threads), modelfuse_tool(space, threads, words)
        self.bystander = space.work / "bystander"
        self.bystander.write_bytes(os.urandom(BYSTANDER_BYTES))
        self.reads = READS[0]
        self.left, self.kept = defaultdict[str, float](float), defaultdict[str, float](lambda: 1.0)

    def files(self, work: Work) -> list[Path]:
        """The weight files that a merge reads."""
        return [path / "model.safetensors" for path in work.inputs(self.space.reference)]

    def choose_read(self, work: Work) -> dict[tuple[int, int], float]:
        """Choose the fastest of READS; returns the seconds of each. Much slower ones are tried only once."""
        times = {each: self.read(work, each).seconds for each in READS}
        best = min(times.values())
        for each, seconds in times.items():
            if seconds < 1.5 * best:
                times[each] = min(seconds, self.read(work, each).seconds)
        self.reads = min(times, key=times.__getitem__)
        return times

    def read(self, work: Work, how: tuple[int, int] | None = None) -> Sample:
        """Time the plain read."""
        evict(self.files(work))
        words = [*map(str, how or self.reads), *map(str, self.files(work))]
        return self._measure([sys.executable, str(HERE / "reading.py"), *words], {})

    def run(self, tool: Tool, work: Work, cold: bool) -> Sample:
        """Time one copy or merge."""
        files = self.files(work)
        shutil.rmtree(self.space.output, ignore_errors=True)
        level_memory(files[-1].stat().st_size, self.space.work)
        command = tool.command(work)
        bring_in([self.bystander])
        bring_in(files)
        if cold:
            evict(files)
        try:
            sample = self._measure(command, tool.env)
        finally:
            shutil.rmtree(self.space.output, ignore_errors=True)
        if cold and tool is self.merge:
            self.left[work.method] = max(self.left[work.method], share(files))
            self.kept[work.method] = min(self.kept[work.method], share([self.bystander]))
        return sample

    def _measure(self, command: Sequence[str], env: dict[str, str]) -> Sample:
        os.sync()  # Unwritten data of an earlier run would slow this one down.
        return measure([*self.before, *command], log=self.space.log, env=env)

    def rounds(self, work: Work, number: int) -> Row:
        """Run all programs in turn, ``number`` times."""
        seconds = defaultdict[str, list[float]](list)
        for _ in range(number):
            seconds[READ].append(self.read(work).seconds)
            seconds[COPY].append(self.run(self.copy, work, cold=True).seconds)
            seconds[COLD].append(self.run(self.merge, work, cold=True).seconds)
            seconds[WARM].append(self.run(self.merge, work, cold=False).seconds)
        middle = {name: median(each) for name, each in seconds.items()}
        to_read, to_copy = (
            median(cold / other for cold, other in zip(seconds[COLD], seconds[name], strict=True))
            for name in (READ, COPY)
        )
        figures = middle[READ], middle[COPY], middle[WARM], middle[COLD], to_read, to_copy
        return Row(work.method, *figures, self.left[work.method], self.kept[work.method])


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(words)
    console = Console(stderr=True, highlight=False)
    try:
        with workspace(options.workdir) as space:
            try:
                _benchmark(options, space, console)
            finally:
                (space.work / "bystander").unlink(missing_ok=True)
    except (CommandFailed, OSError) as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=WORKS, default=list(WORKS), metavar="METHOD", help=", ".join(WORKS))
    add("--repeat", type=int, default=5, help="rounds (5)")
    add("--threads", type=int, default=2, help="threads of the copy and of modelfuse (2)")
    add("--limit", type=float, default=0, metavar="MB", help="limit reading to so many MB/s (root only)")
    add(
        "--delay",
        type=float,
        default=0,
        metavar="MS",
        help="read from a server with this latency (root only)",
    )
    add("--workdir", help="keeps the inputs for the next run; without it, a temporary folder")
    add("--size", choices=SHAPES, default="reference", help="small is for trying out this program")
    add("--json", metavar="FILE", help="write the rows there")
    add("modelfuse", nargs="*", metavar="-- WORDS", help="more words for modelfuse, such as --memory 200MB")
    return parser


def _benchmark(options: argparse.Namespace, space: Workspace, console: Console) -> None:
    shape = SHAPES[options.size]
    with console.status(f"making the inputs: 4 models of {shape.parameters() / 1e6:.0f} M parameters"):
        reference.make_reference(space.reference, shape)
    rows = []
    with ExitStack() as stack:
        before: list[str] = []
        if options.delay:
            bring_in(space.reference.glob("*/*.safetensors"))  # The server's own reads take no time.
            stack.enter_context(distant(space.reference, space.work / "far", options.delay, options.limit * 1e6))
            space = DistantWorkspace(space.work)
        elif options.limit:
            before = stack.enter_context(limited(space.work, int(options.limit * 1e6)))
        bench = Bench(space, options.threads, before, options.modelfuse)
        largest = max((WORKS[name] for name in options.methods), key=lambda work: len(bench.files(work)))
        size = sum(path.stat().st_size for path in bench.files(largest))
        for (threads, block), seconds in bench.choose_read(largest).items():
            how = f"{threads} threads, {block >> 10:,} KiB per block"
            console.print(f"plain read, {how}: {size / 1e9 / seconds:.2f} GB/s", style="dim")
        for name in options.methods:
            bench.run(bench.merge, WORKS[name], cold=False)  # Compiles kernels that are not cached.
            rows.append(bench.rounds(WORKS[name], options.repeat))
            console.print("  ".join(rows[-1].cells()), style="dim")
    limit = f"{options.limit:.0f} MB/s" if options.limit else "no limit"
    disk = f"a server: {options.delay:g} ms, {limit}" if options.delay else f"disk: {limit}"
    title = f"{shape.parameters() / 1e6:.0f} M parameters, bfloat16, {options.threads} threads, {disk}"
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=120).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
