"""modelfuse merges the weights of large models at the speed of copying them.

>>> import modelfuse
>>> sorted(modelfuse.__all__)[-3:]
['report', 'tune', 'verify']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfuse.errors import (
    CheckpointError,
    ClusterError,
    EvaluationError,
    HubError,
    MismatchError,
    MissingExtraError,
    ModelfuseError,
    OutputError,
    RecipeError,
)
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.api.drawing import draw, report
    from modelfuse.api.functions import check, diff, inspect, merge, register, verify
    from modelfuse.api.tune import tune
    from modelfuse.execution.result import Result
    from modelfuse.execution.tuning.request import Tuned
    from modelfuse.inspection.diff_result import Diff
    from modelfuse.inspection.inspected_model import Inspection
    from modelfuse.inspection.merge_report import MergeReport
    from modelfuse.inspection.report_reader import Problem
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.plan import Plan
    from modelfuse.recipe.recipe import Recipe

__all__ = [
    "CheckpointError",
    "ClusterError",
    "Diff",
    "EvaluationError",
    "HubError",
    "Inspection",
    "MergeReport",
    "MismatchError",
    "MissingExtraError",
    "ModelfuseError",
    "OutputError",
    "Plan",
    "Problem",
    "Recipe",
    "RecipeError",
    "Result",
    "Tuned",
    "Verification",
    "__version__",
    "check",
    "diff",
    "draw",
    "inspect",
    "merge",
    "register",
    "report",
    "tune",
    "verify",
]

#: Imported when first used: importing modelfuse loads neither numpy nor msgspec nor a compiler.
_LATER = {
    "Diff": "modelfuse.inspection.diff_result",
    "Inspection": "modelfuse.inspection.inspected_model",
    "MergeReport": "modelfuse.inspection.merge_report",
    "Plan": "modelfuse.planning.plan",
    "Problem": "modelfuse.inspection.report_reader",
    "Recipe": "modelfuse.recipe.recipe",
    "Result": "modelfuse.execution.result",
    "Tuned": "modelfuse.execution.tuning.request",
    "Verification": "modelfuse.inspection.verify",
    **dict.fromkeys(("check", "diff", "inspect", "merge", "register", "verify"), "modelfuse.api.functions"),
    **dict.fromkeys(("draw", "report"), "modelfuse.api.drawing"),
    "tune": "modelfuse.api.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import os
    from importlib import import_module

    if os.name == "nt":
        raise ModelfuseError("modelfuse runs on Linux and macOS", "On Windows, use it in WSL.")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
