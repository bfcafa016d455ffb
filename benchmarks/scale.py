"""Measure how the cost of a merge grows with the model's size, its tensors, and the number of nodes.

    python benchmarks/scale.py sizes --workdir DIR      # merges of increasing size: seconds per GB, memory
    python benchmarks/scale.py plans                    # plans of models up to 1T parameters, with sparse files
    python benchmarks/scale.py nodes                    # one and two simulated Ray nodes
    python benchmarks/scale.py predict --parameters 400e9 --disk 7 --network 12.5 --cores 64 --machines 16

docs/scale.md explains the cost model of the last one.
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
from programs import Workspace, modelfuse_tool
from reference import Shape
from rich.console import Console
from rich.table import Table
from sizes import GROWING, PLANNED, write_models
from works import Work

#: Bytes of the disk that must stay free.
SPARE = 15e9
#: Models with fewer parameters are merged once before they are measured.
SMALL = 1_000_000_000
#: Models of the plans, in addition to a base.
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
    add("--largest", choices=GROWING, help="the largest size (as the disk allows, with 15 GB left free)")
    add("--repeat", type=int, default=3, help="rounds (3)")
    add("--threads", type=int, default=2, help="threads of modelfuse (2)")
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
    add("--models", type=int, default=3, help="without the base (3)")
    add("--base", action=argparse.BooleanOptionalAction, default=True, help="whether there is a base (yes)")
    add("--tensors", type=int, default=1200, help="tensors of each model (1200)")
    add("--disk", type=float, default=7, metavar="GB/S", help="read rate of the disk of a single machine (7)")
    add("--disk-write", type=float, metavar="GB/S", help="its write rate (the read rate)")
    add("--network", type=float, default=12.5, metavar="GB/S", help="network rate of each of several machines (12.5)")
    add("--storage", type=float, metavar="GB/S", help="total rate of their shared storage (not limiting)")
    add("--cores", type=int, default=64, help="cores of each machine (64)")
    add("--pcie", type=float, metavar="GB/S", help="transfer rate to the GPU of each machine, to compute there")
    add("--machines", type=int, nargs="+", default=[1, 16], help="(1 16)")
    return parser


@contextmanager
def _workspace(options: argparse.Namespace) -> Iterator[Workspace]:
    """A temporary workspace below ``--workdir``."""
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="modelfuse-scale-") as folder:
        yield Workspace(Path(folder))


def sizes(options: argparse.Namespace) -> Iterator[Row]:
    """Merge models of increasing size."""
    for name, shape in GROWING.items():
        with _workspace(options) as space:
            # Space for two models, their base, and an output.
            if options.largest is None and shutil.disk_usage(space.work).free < 8 * shape.parameters() + SPARE:
                return
            write_models(space.reference, ["base", "model_1", "model_2"], shape, dense=True)
            yield from _merges(options, space, name, shape)
        if name == options.largest:
            return


def _merges(options: argparse.Namespace, space: Workspace, name: str, shape: Shape) -> Iterator[Row]:
    for method in options.methods:
        work = Work(method, 2, METHODS[method].has_base)
        bench = Beside(space, work, options.threads, options.warm)
        if shape.parameters() < SMALL:
            bench.merge()  # Compiles kernels that are not cached.
        # In turn, so that other load on the machine affects all of them.
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
            "limited by": cost(merge, machine).binding,
        }


def plans(options: argparse.Namespace) -> Iterator[Row]:
    """Plan merges of models that consist of headers only."""
    for name in options.names:
        shape = PLANNED[name]
        with _workspace(options) as space:
            folders = ["base", *(f"model_{number + 1}" for number in range(PLANNED_MODELS))]
            write_models(space.reference, folders, shape, dense=False)
            tool = modelfuse_tool(space, 1, [])
            command = tool.command(Work("ties", PLANNED_MODELS, True))
            command[command.index("merge")] = "check"
            del command[command.index("--output_path") :]  # The disk has no space for it.
            samples = [measure(command, log=space.log, env=tool.env) for _ in range(1 + options.repeat)][1:]
            files = len(list((space.reference / "base").glob("*.safetensors")))
        yield {
            "parameters": name,
            "tensors": len(shape.tensors()),
            "files": files,
            "seconds": median(sample.seconds for sample in samples),
            "least": min(sample.seconds for sample in samples),
            "ms per tensor": 1000 * median(sample.seconds for sample in samples) / len(shape.tensors()),
            "peak MB": max(sample.peak_bytes for sample in samples) / 1e6,
        }


def nodes(options: argparse.Namespace) -> Iterator[Row]:
    """Merge on one simulated Ray node with one CPU, and on two such nodes."""
    shape = GROWING[options.size]
    with _workspace(options) as space:
        write_models(space.reference, ["base", "model_1", "model_2"], shape, dense=True)
        for method in options.methods:
            seconds: dict[str, list[Sample]] = {}
            for _ in range(options.repeat):
                for count in (1, 2):
                    work = Work(method, 2, METHODS[method].has_base)
                    local = _again(space, work, count, ["--quiet"])
                    seconds.setdefault(f"{count} local", []).append(local)
                    with simulated(count) as address:
                        words = ["--quiet", "--engine", "ray", "--ray_address", address]
                        seconds.setdefault(f"{count} ray", []).append(_again(space, work, 1, words))
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


def _again(space: Workspace, work: Work, threads: int, words: Sequence[str]) -> Sample:
    """The second of two merges: the first starts processes and reads files into the page cache."""
    tool = modelfuse_tool(space, threads, words)
    for _ in range(2):
        try:
            sample = measure(tool.command(work), log=space.log, env=tool.env)
        finally:
            shutil.rmtree(space.output, ignore_errors=True)
    return sample


@contextmanager
def simulated(count: int) -> Iterator[str]:
    """The address of a Ray cluster of ``count`` nodes with one CPU each, all on this machine."""
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
    """Compute the time of a merge on other machines."""
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
                "limited by": found.binding,
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
