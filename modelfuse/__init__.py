"""modelfuse merges the weights of large models at the speed of copying them.

>>> import modelfuse
>>> sorted(modelfuse.__all__)[-3:]
['check', 'merge', 'verify']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfuse.errors import (
    CheckpointError,
    ClusterError,
    HubError,
    MismatchError,
    MissingExtraError,
    ModelfuseError,
    OutputError,
    RecipeError,
)
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.api import check, merge, verify
    from modelfuse.plan import Plan
    from modelfuse.recipe import Recipe
    from modelfuse.reported import Problem
    from modelfuse.run import Result
    from modelfuse.verification import Verification

__all__ = [
    "CheckpointError",
    "ClusterError",
    "HubError",
    "MismatchError",
    "MissingExtraError",
    "ModelfuseError",
    "OutputError",
    "Plan",
    "Problem",
    "Recipe",
    "RecipeError",
    "Result",
    "Verification",
    "__version__",
    "check",
    "merge",
    "verify",
]

#: Imported when first used: importing modelfuse loads neither numpy nor msgspec nor a compiler.
_LATER = {
    "Plan": "modelfuse.plan",
    "Problem": "modelfuse.reported",
    "Recipe": "modelfuse.recipe",
    "Result": "modelfuse.run",
    "Verification": "modelfuse.verification",
    "check": "modelfuse.api",
    "merge": "modelfuse.api",
    "verify": "modelfuse.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
