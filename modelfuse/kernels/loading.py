"""Compiled functions that are loaded without the compiler.

Before numba loads a function that it has compiled and kept earlier, it makes itself ready to compile: it imports
what it knows of Python and numpy, for a tenth of a second or more. Running the function takes none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.core import runtime

F = TypeVar("F", bound=Callable[..., Any])


def compile_kernel(function: F) -> F:
    """Have numba compile a function when it is first called, and keep the result for later processes."""
    compiled: Any
    try:
        compiled = njit(cache=True, nogil=True, error_model="numpy")(function)
        _spare_preparations(compiled._cache)
    except RuntimeError:  # There is no folder that the compiled code could be kept in.
        compiled = njit(nogil=True, error_model="numpy")(function)
    kernel: F = compiled
    return kernel


def _spare_preparations(cache: Any) -> None:
    """Let a function's cache load without them; where nothing is kept, numba makes them before it compiles."""
    system: Any = vars(runtime)["rtsys"]

    def load_overload(signature: Any, target: Any) -> Any:
        system.initialize(target)
        with cache._guard_against_spurious_io_errors():
            return cache._load_overload(signature, target)

    cache.load_overload = load_overload
