"""Compile kernels with numba on first call, and cache the machine code.

Machine code is cached in files (:mod:`modelfuse.kernels.jit.code_cache`); if it is found there, numba is not even
imported. A kernel that needs numba's runtime, such as one that allocates memory, is called and cached by numba itself;
so are all kernels if the versions of numba or llvmlite differ too much from those supported here.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from inspect import signature
from time import monotonic
from typing import Any, TypeVar, cast, overload

from modelfuse.kernels.jit import code_cache
from modelfuse.kernels.jit.code_cache import NotLaidOut, Prepared, prepare
from modelfuse.kernels.jit.entry import entry_module
from modelfuse.kernels.jit.linking import link

F = TypeVar("F", bound=Callable[..., Any])

#: Symbols of the C library that machine code may use.
_LIBRARY = {"memcpy", "memmove", "memset", "pread"}
_COUNTING = re.compile(r"^ *(tail )?call void @NRT_(in|de)cref\(.*\n", re.MULTILINE)
#: Held while numba compiles or llvmlite loads: one kernel at a time.
_lock = threading.RLock()
#: Seconds after which a kernel that was not cached is looked for again: another process may have compiled it.
LOOKED_UP_EVERY = 1.0
COMPILING = "Kernels are being compiled for this processor, once; this takes some seconds."
FALLING_BACK = "Machine code cannot be cached for this release of numba; numba's own cache is used for some kernels."
#: Listeners for notes, each with the notes that it has received.
_listeners: list[tuple[Callable[[str], None], set[str]]] = []


@overload
def compile_kernel(function: F) -> F: ...
@overload
def compile_kernel(*, plain: Callable[..., Any]) -> Callable[[F], F]: ...


def compile_kernel(function: F | None = None, *, plain: Callable[..., Any] | None = None) -> Any:
    """Decorator: compile a function on first call, and cache the machine code for later processes.

    Args:
        function: The function.
        plain: An equivalent that needs no compiler; called where compiling is not allowed or not possible.
    """
    if function is None:
        return lambda given: CompiledFunction(given, plain)
    return CompiledFunction(function, plain)


class NotCompiledError(Exception):
    """Raised by a kernel that is not cached while compiling is not allowed."""


class _Policy(threading.local):
    """Whether this thread may compile kernels; None: the process-wide setting applies."""

    compiles: bool | None = None


_policy = _Policy()
#: One entry for each active :func:`nothing_compiled` context.
_forbidding: list[None] = []


def compiler_missing() -> str | None:
    """Why kernels cannot be compiled; None if they can."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if find_spec("numba") is None or find_spec("llvmlite") is None:
        return "numba is not installed"
    return None


@contextlib.contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Allow or forbid compiling in this thread, for the duration of the context."""
    before, _policy.compiles = _policy.compiles, allowed
    try:
        yield
    finally:
        _policy.compiles = before


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Forbid compiling in all threads without a setting of their own, for the duration of the context."""
    _forbidding.append(None)  # A list, as several merges may run concurrently and end in any order.
    try:
        yield
    finally:
        _forbidding.pop()


@contextlib.contextmanager
def announcing(tell: Callable[[str], None]) -> Iterator[None]:
    """Call ``tell`` once with each note on compiling that is announced during the context."""
    listener = tell, set[str]()
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def announce(sentence: str) -> None:
    """Pass a note to all listeners that have not received it yet."""
    for tell, told in _listeners:
        if sentence not in told:
            told.add(sentence)
            with contextlib.suppress(Exception):  # A closed stderr must not fail a merge.
                tell(sentence)


def _may_compile() -> bool:
    """Whether this thread may compile."""
    return not _forbidding if _policy.compiles is None else _policy.compiles


class CompiledFunction:
    """A function that is compiled on first call.

    Args:
        function: A Python function that numba can compile. Arguments are numbers, arrays and tuples of them, or
            results of :func:`modelfuse.kernels.jit.code_cache.prepare`.
        plain: See :func:`compile_kernel`.
    """

    def __init__(self, function: Callable[..., Any], plain: Callable[..., Any] | None = None) -> None:
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self._plain = plain
        self._entries: dict[str, code_cache.Entry | None] = {}
        self._missing_until: dict[str, float] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function, or ``plain``."""
        try:
            laid = [prepare(each) for each in arguments]
        except NotLaidOut:
            return self._by_numba(arguments)
        kind = "".join([each.kind for each in laid])
        try:
            entry = self._entry(kind, arguments)
        except NotCompiledError:
            if self._plain is None:
                raise
            self._missing_until.setdefault(kind, monotonic() + LOOKED_UP_EVERY)
            return self._plain(*(each.value for each in laid))
        if entry is None:
            return self._by_numba(arguments)
        return entry(b"".join([each.words for each in laid]))

    def _entry(self, kind: str, arguments: tuple[Any, ...]) -> code_cache.Entry | None:
        if kind not in self._entries:
            if monotonic() < self._missing_until.get(kind, 0) and not _may_compile():
                raise NotCompiledError(kind)
            with _lock:
                self._missing_until.pop(kind, None)
                if kind not in self._entries:
                    self._entries[kind] = self._find(kind, arguments)
        return self._entries[kind]

    def _by_numba(self, arguments: tuple[Any, ...]) -> Any:
        return self._fallback(*(each.value if type(each) is Prepared else each for each in arguments))

    def _find(self, kind: str, arguments: tuple[Any, ...]) -> code_cache.Entry | None:
        """The cached or newly compiled entry point for arguments of this kind; None if only numba can call it."""
        symbol = code_cache.symbol_of(self.__wrapped__, kind)
        try:
            content = code_cache.find(symbol)
            if content is None:
                if not _may_compile() or compiler_missing():
                    raise NotCompiledError(symbol)
                announce(COMPILING)
                content = _export(self._compiler, symbol, arguments)
                code_cache.keep(symbol, content)
            return code_cache.load(content, symbol) if content else None
        except NotCompiledError:
            raise
        except Exception:
            # The export relies on internals of numba and llvmlite; with other versions, fall back to numba's own cache.
            announce(FALLING_BACK)
            return None

    @cached_property
    def _compiler(self) -> Any:
        """numba's dispatcher, which compiles on call."""
        from numba import njit

        return njit(nogil=True, error_model="numpy")(self.__wrapped__)

    @cached_property
    def _fallback(self) -> Any:
        """numba's dispatcher with its own cache, which does not notice changes of the functions that it calls."""
        import numba

        njit, config = numba.njit, cast("Any", numba.config)
        folder = code_cache.folder_for_numba()
        if folder is None:
            return self._compiler
        with _lock, contextlib.suppress(RuntimeError):  # The cache folder cannot be written.
            before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
            try:
                return njit(cache=True, nogil=True, error_model="numpy")(self.__wrapped__)
            finally:
                config.CACHE_DIR = before
        return self._compiler

    @property
    def _numba_type_(self) -> Any:
        """Lets numba resolve it when another kernel calls it."""
        return self._compiler._numba_type_


class Foreign:
    """A function of the C library that kernels can call.

    Args:
        name: The function's name.
        result: numba's name of its result type.
        arguments: numba's names of its parameter types.
    """

    def __init__(self, name: str, result: str, *arguments: str) -> None:
        self._name, self._result, self._arguments = name, result, arguments

    def __call__(self, *arguments: Any) -> Any:
        """Not callable from Python."""
        raise NotImplementedError(self._name)

    @cached_property
    def _numba_type_(self) -> Any:
        from numba import types

        signature = getattr(types, self._result)(*[getattr(types, each) for each in self._arguments])
        return types.ExternalFunction(self._name, signature)


class Intrinsic(ABC):
    """A function that kernels can call and whose code is written for LLVM; it returns nothing."""

    __call__: Callable[..., None]

    @abstractmethod
    def generate(self, context: Any, builder: Any, types: Any, arguments: Any) -> Any:
        """Build the code, as functions that numba lowers with do."""

    @cached_property
    def _numba_type_(self) -> Any:
        from numba import types
        from numba.core.typing import templates

        def define(_: Any, *arguments: Any) -> Any:
            return types.void(*arguments), self.generate

        # numba takes the names of the parameters from here.
        vars(define)["__signature__"] = signature(type(self).__call__)
        return types.Function(vars(templates)["make_intrinsic_template"](self, define, type(self).__name__))


def _export(dispatcher: Any, symbol: str, arguments: tuple[Any, ...]) -> bytes:
    """Compile a kernel for such arguments to a cache file's content; empty if it needs numba's runtime."""
    import numba
    from llvmlite import binding

    typeof, types = vars(numba)["typeof"], numba.types
    signature = tuple(typeof(each.value if type(each) is Prepared else each) for each in arguments)
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature]
    result = {types.none: b"n", types.int64: b"i", types.boolean: b"b"}.get(overload.signature.return_type)
    if result is None:
        return b""
    module = binding.parse_assembly(str(entry_module(overload, symbol)))
    module.link_in(binding.parse_bitcode(overload.library.serialize_using_bitcode()[2]))
    # Reference counts concern arrays that numba allocates. There are none here, and counting is slower than the work.
    module = binding.parse_assembly(_COUNTING.sub("", str(module)))
    for each in module.functions:
        if not each.is_declaration and each.name != symbol:
            each.linkage = "internal"
    machine = overload.library.codegen._tm
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    needed = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")}
    return result + link(machine.emit_object(module), symbol) if needed <= _LIBRARY else b""
