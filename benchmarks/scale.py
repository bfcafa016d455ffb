"""How the cost of a merge grows: with the model, with its tensors, with machines.

    python benchmarks/scale.py sizes --workdir DIR      # merges of larger and larger models: seconds a GB, memory
    python benchmarks/scale.py plans                    # the plans of models up to 1T parameters, on files with holes
    python benchmarks/scale.py nodes                    # one simulated Ray node against two
    python benchmarks/scale.py predict --parameters 400e9 --disk 7 --network 12.5 --cores 64 --machines 16

What the last one computes, and from what: docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from beside import Beside
from costs import MEASURED, Machines, Merge, cost
from measure import CommandFailed, Sample, measure
from programs import Place, modelfuse_tool
from reference import Shape
from rich.console import Console
from rich.table import Table
from sizes import GROWING, PLANNED, write_models
from works import Work

#: Bytes of the disk that are left alone.
SPARE = 15e9
#: Parameters of a model that is merged once more before it is measured.
SMALL = 1_000_000_000
#: What the command ``check`` is asked for: three models and a base.
PLANNED_MODELS = 3

METHODS = MEASURED.methods

Row = dict[str, str | float | int]


def main(words: list[str] | None = None) -> int:
    """Run one part; returns the exit status."""
    options = _parser().parse_args(words)
    console = Console(stderr=True, highlight=False)
    rows: list[Row] = []
    try:
        for row in options.part(options):
            rows.append(row)
            console.print("  ".join(f"{name} {_cell(each)}" for name, each in row.items()), style="dim")
    except (CommandFailed, OSError) as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    finally:
        if rows:
            Console(width=160).print(_table(rows))
        if rows and options.json:
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(required=True, metavar="sizes | plans | nodes | predict")

    def part(name: str, run: Callable[[argparse.Namespace], Iterator[Row]]) -> Callable[..., Any]:
        added = parts.add_parser(name, help=(run.__doc__ or "").partition("\n")[0])
        added.set_defaults(part=run)
        added.add_argument("--json", metavar="FILE", help="write the rows there")
        return added.add_argument

    add = part("sizes", sizes)
    add("--methods", nargs="+", choices=METHODS, default=["linear", "ties"])
    add("--largest", choices=GROWING, help="as the disk allows, 15 GB of it left alone")
    add("--repeat", type=int, default=3, help="rounds (3)")
    add("--threads", type=int, default=2, help="of modelfuse (2)")
    add("--warm", action="store_true", help="leave the inputs in the page cache")
    add("--workdir", type=Path, help="where the models are made; removed again")
    add = part("plans", plans)
    add("--models", nargs="+", choices=PLANNED, default=list(PLANNED), dest="names", metavar="SIZE")
    add("--repeat", type=int, default=3, help="rounds (3)")
    add("--workdir", type=Path, help="where the models are made; removed again")
    add = part("nodes", nodes)
    add("--size", choices=GROWING, default="0.4B")
    add("--methods", nargs="+", choices=METHODS, default=["linear", "ties"])
    add("--repeat", type=int, default=3, help="rounds (3)")
    add("--workdir", type=Path, help="where the models are made; removed again")
    add = part("predict", predict)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--parameters", type=float, default=400e9)
    add("--models", type=int, default=3, help="the base not counted (3)")
    add("--base", action=argparse.BooleanOptionalAction, default=True, help="whether there is a base (yes)")
    add("--tensors", type=int, default=1200, help="of each model (1200)")
    add("--disk", type=float, default=7, metavar="GB/S", help="what one machine alone reads from its disk (7)")
    add("--disk-write", type=float, metavar="GB/S", help="what it writes to it (as it reads)")
    add("--network", type=float, default=12.5, metavar="GB/S", help="of each of several machines (12.5)")
    add("--storage", type=float, metavar="GB/S", help="of their shared storage in all (as the network)")
    add("--cores", type=int, default=64, help="of each machine (64)")
    add("--pcie", type=float, metavar="GB/S", help="to the GPU of each, if that is to compute")
    add("--machines", type=int, nargs="+", default=[1, 16], help="(1 16)")
    return parser


@contextmanager
def _place(options: argparse.Namespace) -> Iterator[Place]:
    """A folder that is removed again."""
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="modelfuse-scale-") as folder:
        yield Place(Path(folder))


def sizes(options: argparse.Namespace) -> Iterator[Row]:
    """Merge larger and larger models."""
    for name, shape in GROWING.items():
        with _place(options) as place:
            # Two models, their base, and an output.
            if options.largest is None and shutil.disk_usage(place.work).free < 8 * shape.parameters() + SPARE:
                return
            write_models(place.reference, ["base", "model_1", "model_2"], shape, dense=True)
            yield from _merges(options, place, name, shape)
        if name == options.largest:
            return


def _merges(options: argparse.Namespace, place: Place, name: str, shape: Shape) -> Iterator[Row]:
    for method in options.methods:
        work = Work(method, 2, METHODS[method].has_base)
        bench = Beside(place, work, options.threads, options.warm)
        if shape.parameters() < SMALL:
            bench.merge()  # Compiles what is not compiled yet.
        # One after the other, so that whatever else the machine does falls on all of them.
        rounds = [(bench.read(), bench.write(2 * shape.parameters()), bench.merge()) for _ in range(options.repeat)]
        read, write = median(each[0] for each in rounds), median(each[1] for each in rounds)
        samples = [each[2] for each in rounds]
        size = (bench.bytes + 2 * shape.parameters()) / 1e9
        seconds = median(sample.seconds for sample in samples)
        machine = Machines(1, min(options.threads, os.cpu_count() or 1), read, write, network=0)
        merge = Merge(method, shape.parameters(), work.models, work.has_base, len(shape.tensors()))
        yield {
            "parameters": name,
            "method": method,
            "GB": size,
            "seconds": seconds,
            "s/GB": seconds / size,
            "CPU s/GB": median(sample.cpu_seconds for sample in samples) / size,
            "peak MB": max(sample.peak_bytes for sample in samples) / 1e6,
            "disk reads GB/s": read,
            "writes GB/s": write,
            "predicted s": cost(merge, machine).seconds,
            "as it waits for": cost(merge, machine).binding,
        }


def plans(options: argparse.Namespace) -> Iterator[Row]:
    """Plan merges of models of which only the headers are there."""
    for name in options.names:
        shape = PLANNED[name]
        with _place(options) as place:
            folders = ["base", *(f"model_{number + 1}" for number in range(PLANNED_MODELS))]
            write_models(place.reference, folders, shape, dense=False)
            tool = modelfuse_tool(place, 1, [])
            command = tool.command(Work("ties", PLANNED_MODELS, True))
            command[command.index("merge")] = "check"
            del command[command.index("--output_path") :]  # No disk has room for it.
            samples = [measure(command, log=place.log, env=tool.env) for _ in range(1 + options.repeat)][1:]
            files = len(list((place.reference / "base").glob("*.safetensors")))
        yield {
            "parameters": name,
            "tensors": len(shape.tensors()),
            "files": files,
            "seconds": median(sample.seconds for sample in samples),
            "least": min(sample.seconds for sample in samples),
            "ms a tensor": 1000 * median(sample.seconds for sample in samples) / len(shape.tensors()),
            "peak MB": max(sample.peak_bytes for sample in samples) / 1e6,
        }


def nodes(options: argparse.Namespace) -> Iterator[Row]:
    """Merge on one simulated Ray node with one CPU, and on two."""
    shape = GROWING[options.size]
    with _place(options) as place:
        write_models(place.reference, ["base", "model_1", "model_2"], shape, dense=True)
        for method in options.methods:
            seconds: dict[str, list[Sample]] = {}
            for _ in range(options.repeat):
                for count in (1, 2):
                    work = Work(method, 2, METHODS[method].has_base)
                    local = _again(place, work, count, ["--quiet"])
                    seconds.setdefault(f"{count} local", []).append(local)
                    with simulated(count) as address:
                        words = ["--quiet", "--engine", "ray", "--ray_address", address]
                        seconds.setdefault(f"{count} ray", []).append(_again(place, work, 1, words))
            middle = {each: median(sample.seconds for sample in samples) for each, samples in seconds.items()}
            cpu = median(sample.cpu_seconds for sample in seconds["2 ray"])
            yield {
                "method": method,
                "one node s": middle["1 ray"],
                "two nodes s": middle["2 ray"],
                "ratio": middle["1 ray"] / middle["2 ray"],
                "one worker s": middle["1 local"],
                "two workers s": middle["2 local"],
                "ratio without Ray": middle["1 local"] / middle["2 local"],
                "CPU s of the driver": cpu,
            }


def _again(place: Place, work: Work, threads: int, words: Sequence[str]) -> Sample:
    """The second of two merges: processes are started by the first, and files brought into the page cache."""
    tool = modelfuse_tool(place, threads, words)
    for _ in range(2):
        try:
            sample = measure(tool.command(work), log=place.log, env=tool.env)
        finally:
            shutil.rmtree(place.output, ignore_errors=True)
    return sample


@contextmanager
def simulated(count: int) -> Iterator[str]:
    """The address of a Ray cluster whose nodes have a CPU each and are all on this machine."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 << 20}
    head = {"num_cpus": 0, "include_dashboard": False, **store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, **store)
        yield cluster.address
    finally:
        cluster.shutdown()


def predict(options: argparse.Namespace) -> Iterator[Row]:
    """Compute what a merge takes on machines that are not at hand."""
    for number in options.machines:
        machines = Machines(
            number,
            options.cores,
            options.disk,
            options.disk_write or options.disk,
            options.network,
            options.storage,
            options.pcie,
        )
        for method in options.methods:
            merge = Merge(method, options.parameters, options.models, options.base, options.tensors)
            found = cost(merge, machines)
            yield {
                "machines": number,
                "method": method,
                "start": found.start,
                "plan": found.plan,
                **found.overlapping,
                "seconds": found.seconds,
                "binds": found.binding,
            }


def _table(rows: Sequence[Row]) -> Table:
    table = Table()
    for name, each in rows[0].items():
        table.add_column(name, justify="left" if isinstance(each, str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: str | float | int) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
