"""modelfuse merges the weights of large models at the speed of copying them.

>>> import modelfuse
>>> sorted(modelfuse.__all__)[-3:]
['__version__', 'check', 'merge']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfuse.errors import (
    CheckpointError,
    MismatchError,
    MissingExtraError,
    ModelfuseError,
    OutputError,
    RecipeError,
)
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.api import check, merge
    from modelfuse.plan import Plan
    from modelfuse.recipe import Recipe
    from modelfuse.run import Result

__all__ = [
    "CheckpointError",
    "MismatchError",
    "MissingExtraError",
    "ModelfuseError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Result",
    "__version__",
    "check",
    "merge",
]

#: Imported when first used: importing modelfuse loads neither numpy nor pydantic nor a compiler.
_LATER = {
    "Plan": "modelfuse.plan",
    "Recipe": "modelfuse.recipe",
    "Result": "modelfuse.run",
    "check": "modelfuse.api",
    "merge": "modelfuse.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
