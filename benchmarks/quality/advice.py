"""Test the settings that ``modelfuse diff`` suggests: ``python -m benchmarks.quality.advice [REGIME ...]``.

Pairs and larger sets of each regime's experts are merged with the suggested settings, as an average, and with the best
λ of a grid. Rules may be derived from the first set of experts of the hard regime only; all others are test data.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import modelfuse
from demo.llama import Llama, read_safetensors

from .evaluation import Questions, answer
from .regimes import REGIMES, Regime

#: Rows of each task: of sequences, of texts.
ROWS = {"hard": 150}
OTHERS = 10
#: Values of λ for the sum of the differences.
GRID = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.2)
#: Steps through the sets of two, three and more experts in a regime with six.
EVERY = {2: 3, 3: 5, 4: 5, 6: 1}


def main() -> None:
    """Test all regimes, and print means by the number of experts."""
    print("regime, set, experts: average, suggested weights, best weights, ridge")
    for regime in [each for each in REGIMES if each.name in sys.argv[1:] or len(sys.argv) == 1]:
        for number in range(len(regime.experts)):
            found: dict[int, list[tuple[float, ...]]] = {}
            for shares, count in _judge(regime, number):
                found.setdefault(count, []).append(shares)
            for count, rows in found.items():
                print(regime.name, number + 1, count, np.round(np.mean(rows, axis=0), 3), flush=True)


def _judge(regime: Regime, number: int) -> Iterator[tuple[tuple[float, ...], int]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experts, tasks = regime.experts[number], tuple(regime.experts[number])
        whole = {task: _whole(regime, each, folder / task) for task, each in experts.items()}
        count = ROWS.get(regime.name, OTHERS)
        given = regime.test if regime.name == "hard" else regime.validation
        questions = {task: replace(each, numbers=each.numbers[:count], counted=each.counted[:count])
                     for task, each in given.items()}  # fmt: skip
        losses = {
            task: (_loss(Llama(regime.base), own), _loss(Llama(whole[task]), own)) for task, own in questions.items()
        }
        for chosen in _sets(tasks, number):
            some = {task: experts[task] for task in chosen}
            yield tuple(_shares(regime, some, whole, questions, losses, folder)), len(chosen)


def _sets(tasks: tuple[str, ...], number: int) -> Iterator[tuple[str, ...]]:
    for size in range(2, len(tasks) + 1):
        every = EVERY.get(size, 0) if len(tasks) > 3 else 1
        if every:
            yield from [*itertools.combinations(tasks, size)][number % every :: every]


def _whole(regime: Regime, expert: Path, output: Path) -> Path:
    if not regime.adapters:
        return expert
    modelfuse.merge(model_path_list=[expert], base_model_path=regime.base, output_path=output, output_dtype="float32",
                    progress=False)  # fmt: skip
    return output


def _shares(
    regime: Regime, experts: Mapping[str, Path], whole: Mapping[str, Path], questions: Mapping[str, Questions],
    losses: Mapping[str, tuple[float, float]], folder: Path,
) -> Iterator[float]:  # fmt: skip
    """Mean shares of the experts' gain: of an average, suggested weights, the best λ, and ridge."""
    base = read_safetensors(regime.base / "model.safetensors")
    models = [read_safetensors(whole[task] / "model.safetensors") for task in experts]
    total = {name: sum((each[name] - own for each in models), np.zeros_like(own)) for name, own in base.items()}

    def share(model: Llama) -> float:
        gains = [
            (losses[task][0] - _loss(model, questions[task])) / (losses[task][0] - losses[task][1]) for task in experts
        ]
        return float(np.mean(gains))

    def scaled(weight: float) -> float:
        model = Llama(regime.base)
        model.weights = {name: own + np.float32(weight) * total[name] for name, own in base.items()}
        return share(model)

    found = modelfuse.diff(*experts.values(), base=regime.base, progress=False)
    weights = [each.settings["weight_list"] for each in found.advice if "weight_list" in each.settings]
    average = scaled(1 / len(experts))
    advised = scaled(float(weights[0][0])) if weights else average  # Without a suggestion: the average.
    yield from (average, advised, max(average, advised, *map(scaled, GRID)))
    modelfuse.merge(
        merge_method="ridge", model_path_list=[*experts.values()], base_model_path=regime.base,
        output_path=folder / "merged", overwrite=True, output_dtype="float32", model_card=False, progress=False,
    )  # fmt: skip
    yield share(Llama(folder / "merged"))


def _loss(model: Llama, questions: Questions) -> float:
    return float(answer(model, questions).losses.mean())


if __name__ == "__main__":
    main()
