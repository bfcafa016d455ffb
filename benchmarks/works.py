"""The merges of the benchmarks: methods, inputs, and each tool's command line or configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESERVE_P = 0.7
EPSILON = 0.14


@dataclass(frozen=True, slots=True)
class Work:
    """A merge: the method and the checkpoints that it reads."""

    method: str
    models: int
    has_base: bool

    def inputs(self, folder: Path) -> list[Path]:
        """The checkpoint folders that are read, the base last."""
        base = [folder / "base"] if self.has_base else []
        return self.model_paths(folder) + base

    def model_paths(self, folder: Path) -> list[Path]:
        """The checkpoint folders of the fine-tunes."""
        return [folder / f"model_{number}" for number in range(1, self.models + 1)]


WORKS: dict[str, Work] = {
    work.method: work
    for work in (
        Work("linear", 3, False),
        Work("slerp", 2, False),
        Work("ties", 3, True),
        Work("dare_linear", 3, True),
        Work("dare_ties", 3, True),
        Work("della_linear", 3, True),
        Work("della", 3, True),
    )
}


def modelfuse_command(python: str, work: Work, folder: Path, output: Path, threads: int) -> list[str]:
    """The command line of a merge with modelfuse."""
    command = [python, "-m", "modelfuse", "merge", "--merge_method", work.method, "--model_path_list"]
    command += [str(path) for path in work.model_paths(folder)]
    if work.has_base:
        command += ["--base_model_path", str(folder / "base")]
    return [*command, "--output_path", str(output), "--n_process", str(threads), "--overwrite"]


def paddle_settings(work: Work, folder: Path, output: Path, threads: int) -> str:
    """The keyword arguments of PaddleFormers' ``MergeConfig``, as JSON."""
    settings: dict[str, object] = {
        "merge_method": work.method,
        "model_path_list": [str(path) for path in work.model_paths(folder)],
        "output_path": str(output),
        "n_process": threads,
        "reserve_p": RESERVE_P,
        "epsilon": EPSILON,
    }
    if work.has_base:
        settings["base_model_path"] = str(folder / "base")
    return json.dumps(settings)


def arcee_recipe(work: Work, folder: Path) -> str:
    """The configuration of the same merge for mergekit, as JSON, which is valid YAML.

    Its epsilon is half of ours: probabilities range over density ± epsilon there, over p ± ε/2 here.
    """
    models = [str(path) for path in work.model_paths(folder)]
    recipe: dict[str, object] = {"merge_method": work.method, "dtype": "bfloat16"}
    if work.method == "slerp":
        recipe |= {"models": [{"model": name} for name in models]}
        recipe |= {"base_model": models[0], "parameters": {"t": 0.5}}
        return json.dumps(recipe)
    parameters: dict[str, float] = {"weight": 1.0 / work.models}
    if work.has_base:
        recipe["base_model"] = str(folder / "base")
        parameters["density"] = RESERVE_P
    if work.method.startswith("della"):
        parameters["epsilon"] = EPSILON / 2
    recipe["models"] = [{"model": name, "parameters": parameters} for name in models]
    if work.method.endswith("_linear"):
        recipe["parameters"] = {"normalize": False}
    return json.dumps(recipe)
