"""Time mergekit configurations with modelfuse and mergekit 0.1.5, and a plain copy of the same bytes.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/configurations.py --arcee-python /tmp/peer/bin/python [--methods ties slerp] [--workdir DIR]

MODELFUSE_ARCEE_PYTHON may name the interpreter instead. Both tools read the same file and use the same number of
threads; README.md in this folder describes the method. If other programs run, compare processor seconds instead of wall
times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
from levelling import level_memory
from measure import CommandFailed, Sample, measure
from programs import COPY, MODELFUSE, Tool, Workspace, copy_command, importable, modelfuse_tool, workspace
from works import Work

ARCEE, VARIABLE = "arcee", "MODELFUSE_ARCEE_PYTHON"
SHAPES = {
    "reference": reference.Shape(),
    "small": reference.Shape(hidden=256, intermediate=640, layers=6, heads=4, vocabulary=8000),
}
MODELS = ("model_1", "model_2", "model_3")
#: For each method: the number of models, whether there is a base, and its global and per-model parameters.
WHOLE: dict[str, tuple[int, bool, dict[str, Any], dict[str, Any]]] = {
    "linear": (3, False, {}, {"weight": 1 / 3}),
    "slerp": (2, False, {"t": 0.5}, {}),
    "nuslerp": (2, False, {}, {"weight": 0.5}),
    "multislerp": (3, True, {}, {"weight": 1 / 3}),
    "karcher": (3, False, {}, {}),
    "task_arithmetic": (3, True, {}, {"weight": 1 / 3}),
    "ties": (3, True, {}, {"weight": 1 / 3, "density": 0.7}),
    "dare_linear": (3, True, {}, {"weight": 1 / 3, "density": 0.7}),
    "dare_ties": (3, True, {}, {"weight": 1 / 3, "density": 0.7}),
    "breadcrumbs": (3, True, {}, {"weight": 1 / 3, "density": 0.9}),
    "breadcrumbs_ties": (3, True, {}, {"weight": 1 / 3, "density": 0.9}),
    "della": (3, True, {}, {"weight": 1 / 3, "density": 0.7, "epsilon": 0.07}),
    "della_linear": (3, True, {}, {"weight": 1 / 3, "density": 0.7, "epsilon": 0.07}),
    "model_stock": (3, True, {}, {}),
    "nearswap": (1, True, {"t": 0.001}, {}),
    "arcee_fusion": (1, True, {}, {}),
    "sce": (3, True, {"select_topk": 0.5}, {}),
    "ram": (3, True, {}, {}),
    "ramplus_tl": (3, True, {}, {}),
    "passthrough": (2, False, {}, {}),
}


def configuration(method: str, folder: Path, layers: int) -> dict[str, Any]:
    """The configuration that both tools read."""
    models, has_base, whole, each = WHOLE[method]
    names = [str(folder / name) for name in MODELS[:models]]
    content: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "passthrough":
        middle = layers // 2
        ranges = [(names[0], [0, middle]), (names[1], [middle, layers])]
        return content | {"slices": [{"sources": [{"model": name, "layer_range": ends}]} for name, ends in ranges]}
    content["models"] = [{"model": name, **({"parameters": each} if each else {})} for name in names]
    if has_base or method == "slerp":
        content["base_model"] = str(folder / "base") if has_base else names[0]
    return content | ({"parameters": whole} if whole else {})


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(words)
    python = options.arcee_python or os.environ.get(VARIABLE)
    if python is not None and not importable(python, ARCEE):
        print(f"{python} has no mergekit", file=sys.stderr)
        return 1
    try:
        with workspace(options.workdir) as space:
            _benchmark(options, space, python)
    except (CommandFailed, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=WHOLE, default=list(WHOLE), metavar="METHOD", help=", ".join(WHOLE))
    add("--repeat", type=int, default=1, help="rounds (1)")
    add("--threads", type=int, default=2, help="threads of each (2)")
    add("--workdir", help="keeps the inputs for the next run; without it, a temporary folder")
    add("--size", choices=SHAPES, default="reference", help="small is for trying out this program")
    add("--memory", default="1GB", help="the memory that modelfuse may use (1GB)")
    add("--arcee-python", metavar="PATH", help=f"an interpreter that has mergekit; else that of {VARIABLE}")
    add("--json", metavar="FILE", help="write every sample there")
    return parser


def _benchmark(options: argparse.Namespace, space: Workspace, python: str | None) -> None:
    shape = SHAPES[options.size]
    reference.make_reference(space.reference, shape)
    file = space.work / "configuration.yml"
    tools = _tools(options, space, file, python)
    samples: dict[str, dict[str, list[Sample]]] = {}
    print(
        "| method | copy | modelfuse | × copy | mergekit | times faster | processor | mergekit | times less | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        models, has_base, *_ = WHOLE[method]
        work = Work(method, models, has_base)
        file.write_text(json.dumps(configuration(method, space.reference, shape.layers)))  # JSON is valid YAML.
        found = samples.setdefault(method, {})
        for tool in tools[:2]:
            _run(tool, work, space)  # Warm-up: reads the inputs into the page cache and compiles kernels.
        for _ in range(options.repeat):
            for tool in tools:
                found.setdefault(tool.name, []).append(_run(tool, work, space))
        print(_line(method, found), flush=True)
    if options.json:
        content = {method: {tool: [each.as_dict() for each in several] for tool, several in found.items()}
                   for method, found in samples.items()}  # fmt: skip
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


def _tools(options: argparse.Namespace, space: Workspace, file: Path, python: str | None) -> list[Tool]:
    threads = str(options.threads)

    def copied(work: Work) -> list[str]:
        inputs = [path / "model.safetensors" for path in work.inputs(space.reference)]
        if work.method == "passthrough":  # It reads half of each of two models.
            inputs = inputs[:1]
        space.output.mkdir()
        return copy_command(space.output / "model.safetensors", options.threads, inputs)

    def fused(_: Work) -> list[str]:
        return [sys.executable, "-m", "modelfuse", "mergekit-yaml", str(file), str(space.output), "--num-threads",
                threads, "--memory", options.memory, "--quiet"]  # fmt: skip

    def arcee(_: Work) -> list[str]:
        return [str(python), "-m", "mergekit.scripts.run_yaml", str(file), str(space.output), "--no-copy-tokenizer",
                "--quiet", "--num-threads", threads]  # fmt: skip

    env = modelfuse_tool(space, options.threads, ()).env
    tools = [Tool(COPY, copied), Tool(MODELFUSE, fused, env)]
    return tools if python is None else [*tools, Tool(ARCEE, arcee, {"HF_HUB_OFFLINE": "1"})]


def _run(tool: Tool, work: Work, space: Workspace) -> Sample:
    shutil.rmtree(space.output, ignore_errors=True)
    level_memory((space.reference / "base" / "model.safetensors").stat().st_size, space.work)
    command = tool.command(work)
    os.sync()
    try:
        return measure(command, log=space.log, env=tool.env)
    finally:
        shutil.rmtree(space.output, ignore_errors=True)


def _line(method: str, found: dict[str, list[Sample]]) -> str:
    """A row of the table: medians over the rounds, and medians of the ratios within a round."""
    copied, own, peers = (found.get(name, []) for name in (COPY, MODELFUSE, ARCEE))

    def median(several: list[Sample], value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, several))

    def ratio(above: list[Sample], below: list[Sample], value: Callable[[Sample], float]) -> str:
        several = [value(one) / value(other) for one, other in zip(above, below, strict=True)]
        return f"{statistics.median(several):.1f}"

    def seconds(each: Sample) -> float:
        return each.seconds

    def processor(each: Sample) -> float:
        return each.cpu_seconds

    cells = [f"`{method}`", f"{median(copied, seconds):.2f} s", f"{median(own, seconds):.2f} s",
             ratio(own, copied, seconds)]  # fmt: skip
    cells += [f"{median(peers, seconds):.1f} s", ratio(peers, own, seconds)] if peers else ["–", "–"]
    cells += [f"{median(own, processor):.2f} s"]
    cells += [f"{median(peers, processor):.1f} s", ratio(peers, own, processor)] if peers else ["–", "–"]
    cells += [f"{max(each.peak_bytes for each in own) / 1e6:.0f} MB"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
