"""Time merges, a plain copy of the same bytes, and other tools.

    python benchmarks/run.py
    python benchmarks/run.py --workdir DIR --repeat 7 --with-peers --install-peers --json FILE

README.md in this folder describes the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import psutil
import reference
from levelling import level_memory
from measure import CommandFailed, Sample, measure
from programs import (
    COPY,
    PEERS,
    Tool,
    Workspace,
    copy_tool,
    find_peer,
    install_peer,
    modelfuse_tool,
    peer_tool,
    tensor_names,
    workspace,
)
from rich.console import Console
from table import Summary, markdown_table, rich_table, summarise
from works import WORKS, Work

SHAPES = {
    "reference": reference.Shape(),
    "small": reference.Shape(hidden=256, intermediate=640, layers=6, heads=4, vocabulary=8000),
}
#: Bytes per parameter of the largest output: modelfuse writes two, a peer may write four.
OUTPUT_BYTES = 4

Samples = dict[tuple[str, str], list[Sample]]


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(words)
    console = Console(stderr=True)
    try:
        with workspace(options.workdir) as space:
            return _benchmark(options, space, console)
    except (CommandFailed, OSError) as error:
        console.print(f"[red]failed:[/] {error}", highlight=False)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=WORKS, default=list(WORKS), metavar="METHOD", help=", ".join(WORKS))
    add("--repeat", type=int, default=5, help="rounds; every round times the copy and modelfuse (5)")
    add("--rest", type=float, default=0.0, metavar="SECONDS", help="rest before each run; memory is not warmed up (0)")
    add("--threads", type=int, default=2, help="threads of the copy, threads or processes of each tool (2)")
    add("--workdir", help="keeps the inputs and peers for the next run; without it, a temporary folder")
    add("--size", choices=SHAPES, default="reference", help="small is for trying out this program")
    add("--without-modelfuse", action="store_true", help="time the copy and the peers asked for only")
    add("--with-peers", nargs="*", choices=PEERS, metavar="PEER", help="arcee, paddle; both without a name")
    add("--install-peers", action="store_true", help="install the peers with pip under the workdir")
    add("--peer-repeat", type=int, default=1, help="rounds that time the peers too (1)")
    for peer in PEERS:
        add(f"--{peer}-python", metavar="PATH", help=f"an interpreter that has {peer}'s tool")
    add("--json", metavar="FILE", help="write every sample there")
    add("--markdown", metavar="FILE", help="write the table there; - prints it")
    add("modelfuse", nargs="*", metavar="-- WORDS", help="more words for modelfuse, such as --memory 200MB")
    return parser


def _benchmark(options: argparse.Namespace, space: Workspace, console: Console) -> int:
    shape = SHAPES[options.size]
    _check_space(space, shape, console)
    with console.status(f"making the inputs: 4 models of {shape.parameters() / 1e6:.0f} M parameters"):
        reference.make_reference(space.reference, shape)
    tools = [copy_tool(space, options.threads)]
    if not options.without_modelfuse:
        tools.append(modelfuse_tool(space, options.threads, options.modelfuse))
    peers = _peers(options, space, console)
    works = [WORKS[name] for name in options.methods]
    samples: Samples = defaultdict(list)
    for work in works:
        for tool in tools:
            _run(tool, work, space, console, "warm-up", options.rest)
    for number in range(options.repeat):
        for work in works:
            for tool in tools + (peers if number < options.peer_repeat else []):
                sample = _run(tool, work, space, console, f"round {number + 1} of {options.repeat}", options.rest)
                samples[work.method, tool.name].append(sample)
    summaries = _summaries(samples, shape)
    _report(options, summaries, samples, shape)
    return 0


def _check_space(space: Workspace, shape: reference.Shape, console: Console) -> None:
    """Check the free disk space; warn if the page cache cannot hold the inputs.

    Raises:
        OSError: If the disk has too little free space.
    """
    model = 2 * shape.parameters()
    made = sum(path.stat().st_size for path in space.reference.glob("*/*.safetensors"))
    needed = max(0, 4 * model - made) + OUTPUT_BYTES * shape.parameters()
    if (free := shutil.disk_usage(space.work).free) < needed * 1.1:
        raise OSError(f"{space.work} has {free / 1e9:.1f} GB free; {needed * 1.1 / 1e9:.1f} are needed")
    if (memory := psutil.virtual_memory().available) < 6 * model:
        console.print(f"[yellow]only {memory / 1e9:.1f} GB of memory: the inputs may not stay in it[/]")


def _peers(options: argparse.Namespace, space: Workspace, console: Console) -> list[Tool]:
    """The requested peers, installed if requested, and imported once so that their files are in the page cache."""
    if options.with_peers is None and not options.install_peers:
        return []
    found: list[Tool] = []
    for peer in options.with_peers or PEERS:
        if options.install_peers:
            with console.status(f"installing {peer}"):
                install_peer(peer, space)
        python = find_peer(peer, space, getattr(options, f"{peer}_python"))
        if python is None:
            raise OSError(f"{peer} is not installed: add --install-peers, or --{peer}-python PATH")
        found.append(peer_tool(peer, python, space, options.threads))
    return found


def _run(tool: Tool, work: Work, space: Workspace, console: Console, what: str, rest: float) -> Sample:
    """Time one run of a tool, and check that it wrote every tensor."""
    shutil.rmtree(space.output, ignore_errors=True)
    try:
        if not rest:
            level_memory((work.inputs(space.reference)[-1] / "model.safetensors").stat().st_size, space.work)
        command = tool.command(work)
        # Unwritten data of an earlier run would slow this one down.
        os.sync()
        time.sleep(rest)
        with console.status(f"{what}: {work.method}, {tool.name}"):
            sample = measure(command, log=space.log, env=tool.env)
        if tool.name != COPY and tensor_names(space.output) != tensor_names(space.reference / "model_1"):
            raise CommandFailed(f"{tool.name}, {work.method}: tensors are missing from the output")
    finally:
        shutil.rmtree(space.output, ignore_errors=True)
    console.print(f"{what}: {work.method}, {tool.name}: {sample.seconds:.2f} s", style="dim", highlight=False)
    return sample


def _summaries(samples: Samples, shape: reference.Shape) -> list[Summary]:
    result = []
    for (method, tool), each in samples.items():
        work = WORKS[method]
        size = 2 * shape.parameters() * (work.models + work.has_base + 1)
        result.append(summarise(method, tool, each, samples[method, COPY], size))
    return result


def _report(options: argparse.Namespace, summaries: list[Summary], samples: Samples, shape: reference.Shape) -> None:
    """Print the table and write the requested files."""
    size = f"{shape.parameters() / 1e6:.0f} M parameters"
    title = f"{size}, bfloat16, {options.threads} threads, warm page cache"
    Console().print(rich_table(summaries, title))
    if options.markdown == "-":
        sys.stdout.write(markdown_table(summaries) + "\n")
    elif options.markdown:
        Path(options.markdown).write_text(markdown_table(summaries) + "\n")
    if options.json:
        machine = {"cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()}
        rows = [
            {"method": method, "tool": tool, "round": number, **sample.as_dict()}
            for (method, tool), each in samples.items()
            for number, sample in enumerate(each)
        ]
        document = {
            "machine": machine | {"memory_bytes": psutil.virtual_memory().total},
            "python": platform.python_version(),
            "parameters": shape.parameters(),
            "threads": options.threads,
            "summaries": [asdict(summary) for summary in summaries],
            "samples": rows,
        }
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
