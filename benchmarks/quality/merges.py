"""Merge with every method, with a λ chosen on validation data and with the default, and evaluate the results."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import modelfuse
from demo.llama import Floats, Llama, read_safetensors
from modelfuse.methods.registry import METHODS

from .evaluation import Answers, Known, answer, answer_all
from .grams import write_grams
from .regimes import Regime

#: λ is chosen so that the norm of the merged difference is one of these shares of the norm of the sum of the
#: differences; then values between the best one and its neighbours are tried.
NORMS = (0.15, 0.3, 0.6, 1.1)
#: The ratio to the neighbour that is missing at the ends of NORMS, squared.
BEYOND = 1.5
#: Settings from the methods' papers that are evaluated in addition to the defaults.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {"ties": ({"reserve_p": 0.2},)}
#: Tokens of each task for methods that use Gram matrices of inputs.
TOKENS = 512
#: The method that all are compared with.
PLAIN = "task_arithmetic"


@dataclass(frozen=True)
class Variant:
    """A method with settings.

    Attributes:
        label: Its name in tables.
        method: The method's name.
        settings: Settings other than the defaults.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> int | None:
        """The maximum number of models; None: any number."""
        return METHODS[self.method].combination.models[1]

    @property
    def has_base(self) -> bool:
        """Whether it merges differences to a base."""
        return METHODS[self.method].combination.base != "none"

    @property
    def takes_grams(self) -> bool:
        """Whether it uses Gram matrices of the models' inputs."""
        how = METHODS[self.method].combination.matrix
        return how is not None and how.gram == "given"

    @property
    def has_factor(self) -> bool:
        """Whether it has λ; in methods of one model, the base is a second model instead."""
        return self.has_base and self.takes != 1


@dataclass(frozen=True)
class Merged:
    """The results of one variant for one set of experts.

    Attributes:
        factor: The chosen λ, and the norm of the merged difference relative to that of the sum; None without λ.
        tuned: The answers to test questions with this λ.
        usual: Those with the default λ.
        general: Those with this λ on the base's training distribution.
    """

    factor: tuple[float, float] | None
    tuned: Mapping[str, Answers]
    usual: Mapping[str, Answers]
    general: Answers


def variants() -> list[Variant]:
    """All methods, and their VARIANTS; linear with a base is task arithmetic."""
    found = [Variant(PLAIN, PLAIN)]
    for name in METHODS:
        if name in (PLAIN, "linear"):
            continue
        found.append(Variant(name, name))
        for settings in VARIANTS.get(name, ()):
            words = ", ".join(f"{key} {value}" for key, value in settings.items())
            found.append(Variant(f"{name} ({words})", name, settings))
    return found


class Experts:
    """A set of experts of a regime, and the results that merges are compared with.

    Args:
        regime: The regime.
        number: The number of the set.
        folder: A folder for merges.
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

    @cached_property
    def _grams(self) -> list[Path]:
        """Gram matrices of the experts' inputs; few methods take them."""
        return [self._collect(task) for task in self.folders]

    def _collect(self, task: str) -> Path:
        """Gram matrices of an expert's inputs on the first validation questions."""
        output, numbers = self.folder / f"grams-{task}.safetensors", self.regime.validation[task].numbers
        write_grams(self.whole[task], numbers[: TOKENS // numbers.shape[1]], output, self.folders[task].name)
        return output

    def _whole(self, task: str) -> Path:
        """An adapter merged into its base."""
        output = self.folder / f"whole-{task}"
        modelfuse.merge(model_path_list=[self.folders[task]], base_model_path=self.regime.base, output_path=output,
                        output_dtype="float32", progress=False)  # fmt: skip
        return output

    def judge(self, variant: Variant) -> Merged:
        """Choose λ, merge and evaluate."""
        if not variant.has_factor:
            merged = self._merge(variant, None)
            answers = answer_all(merged, self.regime.test)
            return Merged(None, answers, answers, answer(Llama(merged), self.regime.general))
        factor = self._best_factor(variant)
        usual = answer_all(self._merge(variant, None), self.regime.test)
        merged = self._merge(variant, factor[0])
        return Merged(factor, answer_all(merged, self.regime.test), usual, answer(Llama(merged), self.regime.general))

    def _best_factor(self, variant: Variant) -> tuple[float, float]:
        """The λ with the best validation share of six, and the relative norm of its merged difference."""
        plain = self._merge(variant, 1.0)
        size = self.norm_of(plain) / self._norm

        def share(norm: float) -> float:
            answers = answer_all(self._merge(variant, norm / size), self.regime.validation)
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

    def _merge(self, variant: Variant, factor: float | None) -> Path:
        """Merge with a λ; None: the default."""
        experts = self._models(variant)
        if variant.takes is not None and variant.takes < len(experts):
            return self._in_turn(variant, factor)
        return self._run(variant, experts, self.regime.base, "merged", factor)

    def _models(self, variant: Variant) -> list[Path]:
        """The experts; for a method without a common base, adapters are merged into theirs first."""
        return [*(self.folders if variant.has_factor else self.whole).values()]

    def _in_turn(self, variant: Variant, factor: float | None) -> Path:
        """Merge one expert after the other into the result so far; λ is applied with the last one."""
        experts = self._models(variant)
        so_far = experts[0]
        for number, expert in enumerate(experts[1:], 2):
            last = number == len(experts)
            output = "merged" if last else f"step-{number}"
            if variant.takes == 1:
                so_far = self._run(variant, [expert], so_far, output, None)
                continue
            # With orthogonal differences, this gives all experts the same weight.
            share = math.asin(1 / math.sqrt(number)) * 2 / math.pi
            own = {"slerp_alpha": share} if variant.method == "slerp" else {"weight_list": [1 - share, share]}
            step = Variant(variant.label, variant.method, {**variant.settings, **own})
            so_far = self._run(step, [so_far, expert], self.regime.base, output, factor if last else None)
        return so_far

    def _run(self, variant: Variant, models: Sequence[Path], base: Path, name: str, factor: float | None) -> Path:
        output = self.folder / name
        settings = {**variant.settings, **({} if factor is None else {"lambda_": factor})}
        if variant.takes_grams:
            settings["gram_list"] = self._grams
        modelfuse.merge(
            merge_method=variant.method, model_path_list=models, base_model_path=base if variant.has_base else None,
            output_path=output, overwrite=True, output_dtype="float32", model_card=False, n_process=1, progress=False,
            **settings,
        )  # fmt: skip
        return output


def judge_all(regime: Regime, number: int, chosen: Sequence[Variant]) -> tuple[dict[str, Known], dict[str, Merged]]:
    """Evaluate some variants for one set of experts."""
    with tempfile.TemporaryDirectory() as folder:
        experts = Experts(regime, number, Path(folder))
        return experts.known, {variant.label: experts.judge(variant) for variant in chosen}


def _matrices(folder: Path) -> dict[str, Floats]:
    """The matrices of a model's layers."""
    tensors = read_safetensors(folder / "model.safetensors")
    return {name: each for name, each in tensors.items() if each.ndim == 2 and ".layers." in name}


def _norm(tensors: Mapping[str, Floats]) -> float:
    return math.sqrt(sum(float(np.vdot(each, each)) for each in tensors.values()))
