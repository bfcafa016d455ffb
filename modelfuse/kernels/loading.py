"""Compiled functions that are loaded without the compiler.

Before numba loads a function that it has compiled and kept earlier, it makes itself ready to compile: it imports
what it knows of Python and numpy, for a tenth of a second or more. Running the function takes none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys


class LoadingCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of a function, less the preparations for compiling; those numba makes again if it does compile."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The function compiled for these types, or None if there is none."""
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def compile_kernel(function: Callable[..., Any]) -> Any:
    """Have numba compile a function when it is first called, and keep the result for later processes."""
    compiled: Any
    try:
        compiled = njit(cache=True, nogil=True, error_model="numpy")(function)
        compiled._cache = LoadingCache(function)
    except RuntimeError:  # There is no folder that the compiled code could be kept in.
        compiled = njit(nogil=True, error_model="numpy")(function)
    return compiled
