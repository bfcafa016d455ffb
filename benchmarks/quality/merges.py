"""Every method merged with a λ that validation has chosen, and as it is where nobody chooses: by modelfuse itself."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import modelfuse
from demo.llama import Floats, Llama, read_safetensors
from modelfuse.methods.registry import METHODS

from .grams import write_grams
from .marks import Answers, Known, answer, answer_all
from .regimes import Regime

#: λ is tried so that the merged difference has these shares of the norm of the sum of the differences; then between
#: the best of them and its neighbours.
NORMS = (0.15, 0.3, 0.6, 1.1)
BEYOND = 1.5
#: Settings that are tried beside the defaults, as the paper has them.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {"ties": ({"reserve_p": 0.2},)}
#: Of methods that take Gram matrices of inputs: how many tokens of each task are read.
TOKENS = 512
#: The one that all are held against.
PLAIN = "task_arithmetic"


@dataclass(frozen=True)
class Way:
    """A method, with settings.

    Attributes:
        label: What tables call it.
        method: Its name.
        settings: Those that are not the defaults.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> int | None:
        """The most models that it takes; None: any number."""
        return METHODS[self.method].combination.models[1]

    @property
    def has_base(self) -> bool:
        """Whether it acts on differences to a base."""
        return METHODS[self.method].combination.base != "none"

    @property
    def takes_grams(self) -> bool:
        """Whether it takes Gram matrices of the models' inputs."""
        how = METHODS[self.method].combination.matrix
        return how is not None and how.gram == "given"

    @property
    def has_factor(self) -> bool:
        """Whether λ means anything: the base of a method of one model is a model, too."""
        return self.has_base and self.takes != 1


@dataclass(frozen=True)
class Merged:
    """What came of one way to merge one set of experts.

    Attributes:
        factor: The λ that was chosen, and the norm that it gives, relative to that of the sum; None: it has none.
        tuned: The answers to the test's questions with it.
        usual: Those without any λ given.
        general: Those, with λ chosen, to questions about what the base was trained on.
    """

    factor: tuple[float, float] | None
    tuned: Mapping[str, Answers]
    usual: Mapping[str, Answers]
    general: Answers


def ways() -> list[Way]:
    """Every method that there is; linear with a base is task arithmetic."""
    found = [Way(PLAIN, PLAIN)]
    for name in METHODS:
        if name in (PLAIN, "linear"):
            continue
        found.append(Way(name, name))
        for settings in VARIANTS.get(name, ()):
            words = ", ".join(f"{key} {value}" for key, value in settings.items())
            found.append(Way(f"{name} ({words})", name, settings))
    return found


class Experts:
    """One set of experts of a regime, and what is known of them.

    Args:
        regime: The regime.
        number: Which of its sets.
        folder: Where merges may be written.
    """

    def __init__(self, regime: Regime, number: int, folder: Path) -> None:
        self.regime, self.folder = regime, folder
        self.folders = regime.experts[number]
        self.whole = {task: self._whole(task) for task in self.folders} if regime.adapters else self.folders
        whole = self.whole
        self.known = {
            which: Known(answer_all(regime.base, questions),
                         {task: answer_all(whole[task], {task: questions[task]})[task] for task in questions},
                         answer(Llama(regime.base), regime.general))
            for which, questions in (("validation", regime.validation), ("test", regime.test))
        }  # fmt: skip
        self._base = _matrices(regime.base)
        self._norm = _norm({
            name: sum((_matrices(each)[name] for each in whole.values()), -len(whole) * base)
            for name, base in self._base.items()
        })  # fmt: skip

        self._grams = [self._collect(task) for task in self.folders]

    def _collect(self, task: str) -> Path:
        """What a few hundred tokens of validation say of an expert's inputs."""
        output, numbers = self.folder / f"grams-{task}.safetensors", self.regime.validation[task].numbers
        write_grams(self.whole[task], numbers[: TOKENS // numbers.shape[1]], output, self.folders[task].name)
        return output

    def _whole(self, task: str) -> Path:
        """An adapter's model."""
        output = self.folder / f"whole-{task}"
        modelfuse.merge(model_path_list=[self.folders[task]], base_model_path=self.regime.base, output_path=output,
                        output_dtype="float32", progress=False)  # fmt: skip
        return output

    def judge(self, way: Way) -> Merged:
        """Choose λ, merge, and have the result answer."""
        if not way.has_factor:
            merged = self._merge(way, None)
            answers = answer_all(merged, self.regime.test)
            return Merged(None, answers, answers, answer(Llama(merged), self.regime.general))
        factor = self._best_factor(way)
        usual = answer_all(self._merge(way, None), self.regime.test)
        merged = self._merge(way, factor[0])
        return Merged(factor, answer_all(merged, self.regime.test), usual, answer(Llama(merged), self.regime.general))

    def _best_factor(self, way: Way) -> tuple[float, float]:
        """The λ whose validation share is the best of six, and the norm that it gives."""
        plain = self._merge(way, 1.0)
        size = self.norm_of(plain) / self._norm

        def share(norm: float) -> float:
            answers = answer_all(self._merge(way, norm / size), self.regime.validation)
            return float(np.mean([*self.known["validation"].shares(answers).values()]))

        tried = {norm: share(norm) for norm in NORMS}
        best = max(tried, key=lambda norm: tried[norm])
        at = NORMS.index(best)
        lower = NORMS[at - 1] if at else best / BEYOND**2
        upper = NORMS[at + 1] if at + 1 < len(NORMS) else best * BEYOND**2
        tried |= {norm: share(norm) for norm in (math.sqrt(best * lower), math.sqrt(best * upper))}
        best = max(tried, key=lambda norm: tried[norm])
        return best / size, best

    def norm_of(self, merged: Path) -> float:
        """The norm of a merge's difference to the base, over the matrices of layers."""
        return _norm({name: each - self._base[name] for name, each in _matrices(merged).items()})

    def _merge(self, way: Way, factor: float | None) -> Path:
        """Merge with a λ, or without any given."""
        experts = self._models(way)
        if way.takes is not None and way.takes < len(experts):
            return self._in_turn(way, factor)
        return self._run(way, experts, self.regime.base, "merged", factor)

    def _models(self, way: Way) -> list[Path]:
        """The experts: of adapters, the models, where no base is there for all of them."""
        return [*(self.folders if way.has_factor else self.whole).values()]

    def _in_turn(self, way: Way, factor: float | None) -> Path:
        """Merge one expert after the other into what there is; λ comes with the last one."""
        experts = self._models(way)
        so_far = experts[0]
        for number, expert in enumerate(experts[1:], 2):
            last = number == len(experts)
            output = "merged" if last else f"step-{number}"
            if way.takes == 1:
                so_far = self._run(way, [expert], so_far, output, None)
                continue
            # Where differences stand at right angles, all count alike so.
            share = math.asin(1 / math.sqrt(number)) * 2 / math.pi
            own = {"slerp_alpha": share} if way.method == "slerp" else {"weight_list": [1 - share, share]}
            step = Way(way.label, way.method, {**way.settings, **own})
            so_far = self._run(step, [so_far, expert], self.regime.base, output, factor if last else None)
        return so_far

    def _run(self, way: Way, models: Sequence[Path], base: Path, name: str, factor: float | None) -> Path:
        output = self.folder / name
        settings = {**way.settings, **({} if factor is None else {"lambda_": factor})}
        if way.takes_grams:
            settings["gram_list"] = self._grams
        modelfuse.merge(
            merge_method=way.method, model_path_list=models, base_model_path=base if way.has_base else None,
            output_path=output, overwrite=True, output_dtype="float32", model_card=False, n_process=1, progress=False,
            **settings,
        )  # fmt: skip
        return output


def judge_all(regime: Regime, number: int, chosen: Sequence[Way]) -> tuple[dict[str, Known], dict[str, Merged]]:
    """Judge some ways to merge one set of experts."""
    with tempfile.TemporaryDirectory() as folder:
        experts = Experts(regime, number, Path(folder))
        return experts.known, {way.label: experts.judge(way) for way in chosen}


def _matrices(folder: Path) -> dict[str, Floats]:
    """The matrices of a model's layers."""
    tensors = read_safetensors(folder / "model.safetensors")
    return {name: each for name, each in tensors.items() if each.ndim == 2 and ".layers." in name}


def _norm(tensors: Mapping[str, Floats]) -> float:
    return math.sqrt(sum(float(np.vdot(each, each)) for each in tensors.values()))
