"""The door to the compiler: kernels are compiled when they are first called on a machine, and never again.

What numba has made of a kernel is kept as plain machine code (:mod:`modelfuse.kernels.jit.code_cache`), and numba is
not even imported where that is found. A kernel that cannot live without numba, as one that allocates memory, is
called by it, and kept by it; so is every kernel where numba or llvmlite are too different from those known here.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar, cast, overload

from modelfuse.kernels.jit import code_cache
from modelfuse.kernels.jit.code_cache import NotLaidOut, Prepared, prepare
from modelfuse.kernels.jit.linking import link

F = TypeVar("F", bound=Callable[..., Any])

#: What machine code may need of the process that loads it.
_LIBRARY = {"memcpy", "memmove", "memset", "pread"}
_COUNTING = re.compile(r"^ *(tail )?call void @NRT_(in|de)cref\(.*\n", re.MULTILINE)
#: numba compiles, and llvmlite loads, one kernel at a time.
_lock = threading.RLock()
COMPILING = "Kernels are being compiled for this processor, once: that takes some seconds."
FALLING_BACK = "numba calls some kernels by itself: its release is not one that their machine code can be kept of."
#: Whom to tell, each with what was told already.
_listeners: list[tuple[Callable[[str], None], set[str]]] = []


@overload
def compile_kernel(function: F) -> F: ...
@overload
def compile_kernel(*, plain: Callable[..., Any]) -> Callable[[F], F]: ...


def compile_kernel(function: F | None = None, *, plain: Callable[..., Any] | None = None) -> Any:
    """Have a function compiled when it is first called; the result is kept for later processes.

    Args:
        function: What to compile.
        plain: Does the same without a compiler; it is called where none may be used.
    """
    if function is None:
        return lambda given: CompiledFunction(given, plain)
    return CompiledFunction(function, plain)


class NotCompiledError(Exception):
    """Raised by a kernel that was not compiled before, where nothing may be compiled now."""


class _Policy(threading.local):
    """Whether kernels may be compiled: in this thread, if it says anything, else in all others."""

    compiles: bool | None = None


_policy = _Policy()
#: One for each that has nothing compiled.
_forbidding: list[None] = []


def compiler_missing() -> str | None:
    """Why nothing can be compiled; None if it can."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if find_spec("numba") is None or find_spec("llvmlite") is None:
        return "numba is not installed"
    return None


@contextlib.contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Say for this thread whether anything may be compiled meanwhile."""
    before, _policy.compiles = _policy.compiles, allowed
    try:
        yield
    finally:
        _policy.compiles = before


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Have nothing compiled meanwhile, by threads that say nothing themselves."""
    _forbidding.append(None)  # Several merges may run at the same time, and end in any order.
    try:
        yield
    finally:
        _forbidding.pop()


@contextlib.contextmanager
def announcing(tell: Callable[[str], None]) -> Iterator[None]:
    """Have a function called with each sentence that is announced meanwhile, once: why kernels take longer."""
    listener = tell, set[str]()
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def announce(sentence: str) -> None:
    """Say something about kernels to whoever listens."""
    for tell, told in _listeners:
        if sentence not in told:
            told.add(sentence)
            with contextlib.suppress(Exception):  # Nobody may be there to hear it.
                tell(sentence)


class CompiledFunction:
    """A compiled function.

    Args:
        function: Plain Python that numba can compile. Arguments are numbers, arrays, and tuples of them, or what
            :func:`modelfuse.kernels.jit.code_cache.prepare` makes of such.
    """

    def __init__(self, function: Callable[..., Any], plain: Callable[..., Any] | None = None) -> None:
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self._plain = plain
        self._entries: dict[str, code_cache.Entry | None] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run on the arguments."""
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
            return self._plain(*(each.value for each in laid))
        if entry is None:
            return self._by_numba(arguments)
        return entry(b"".join([each.words for each in laid]))

    def _entry(self, kind: str, arguments: tuple[Any, ...]) -> code_cache.Entry | None:
        if kind not in self._entries:
            with _lock:
                if kind not in self._entries:
                    self._entries[kind] = self._find(kind, arguments)
        return self._entries[kind]

    def _by_numba(self, arguments: tuple[Any, ...]) -> Any:
        return self._fallback(*(each.value if type(each) is Prepared else each for each in arguments))

    def _find(self, kind: str, arguments: tuple[Any, ...]) -> code_cache.Entry | None:
        """Machine code for arguments of this kind: kept, or compiled now; None if only numba can call it."""
        symbol = code_cache.symbol_of(self.__wrapped__, kind)
        try:
            content = code_cache.find(symbol)
            if content is None:
                allowed = not _forbidding if _policy.compiles is None else _policy.compiles
                if not allowed or compiler_missing():
                    raise NotCompiledError(symbol)
                announce(COMPILING)
                content = _export(self._compiler, symbol, arguments)
                code_cache.keep(symbol, content)
            return code_cache.load(content, symbol) if content else None
        except NotCompiledError:
            raise
        except Exception:
            # numba and llvmlite change: what was built for others of theirs must not stand in the way of these.
            announce(FALLING_BACK)
            return None

    @cached_property
    def _compiler(self) -> Any:
        """numba's own function, which compiles when it is called."""
        from numba import njit

        return njit(nogil=True, error_model="numpy")(self.__wrapped__)

    @cached_property
    def _fallback(self) -> Any:
        """The same; it keeps what it has made. It does so for a function alone: those that it calls may be newer."""
        import numba

        njit, config = numba.njit, cast("Any", numba.config)
        folder = code_cache.folder_for_numba()
        if folder is None:
            return self._compiler
        with _lock, contextlib.suppress(RuntimeError):  # It cannot write there.
            before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
            try:
                return njit(cache=True, nogil=True, error_model="numpy")(self.__wrapped__)
            finally:
                config.CACHE_DIR = before
        return self._compiler

    @property
    def _numba_type_(self) -> Any:
        """So numba knows it where another kernel calls it."""
        return self._compiler._numba_type_


class Foreign:
    """A function of the C library, for kernels to call.

    Args:
        name: Its name.
        result: What it returns, as numba calls it.
        arguments: What it takes.
    """

    def __init__(self, name: str, result: str, *arguments: str) -> None:
        self._name, self._result, self._arguments = name, result, arguments

    def __call__(self, *arguments: Any) -> Any:
        """Only compiled code calls it."""
        raise NotImplementedError(self._name)

    @cached_property
    def _numba_type_(self) -> Any:
        from numba import types

        signature = getattr(types, self._result)(*[getattr(types, each) for each in self._arguments])
        return types.ExternalFunction(self._name, signature)


def _export(dispatcher: Any, symbol: str, arguments: tuple[Any, ...]) -> bytes:
    """Compile a kernel for arguments like these into the content of a file; nothing if it needs numba when it runs."""
    import numba
    from llvmlite import binding

    typeof, types = vars(numba)["typeof"], numba.types
    signature = tuple(typeof(each.value if type(each) is Prepared else each) for each in arguments)
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature]
    result = {types.none: b"n", types.int64: b"i", types.boolean: b"b"}.get(overload.signature.return_type)
    if result is None:
        return b""
    module = binding.parse_assembly(str(_entry_module(overload, symbol)))
    module.link_in(binding.parse_bitcode(overload.library.serialize_using_bitcode()[2]))
    # Counted references are those of numba's own arrays. Here there are none, and counting takes longer than the work.
    module = binding.parse_assembly(_COUNTING.sub("", str(module)))
    for each in module.functions:
        if not each.is_declaration and each.name != symbol:
            each.linkage = "internal"
    machine = overload.library.codegen._tm
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    needed = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")}
    return result + link(machine.emit_object(module), symbol) if needed <= _LIBRARY else b""


def _entry_module(overload: Any, symbol: str) -> Any:
    """A function that takes the words of a kernel's arguments, calls it, and leaves what it returns in a word."""
    from llvmlite import ir

    context, returned, word, status = (
        overload.target_context,
        overload.signature.return_type,
        ir.IntType(64),
        ir.IntType(32),
    )
    module = ir.Module(symbol)
    entry = ir.Function(module, ir.FunctionType(status, [word.as_pointer(), word.as_pointer()]), symbol)
    builder = ir.IRBuilder(entry.append_basic_block())
    packer = context.get_arg_packer(overload.signature.args)
    flat = []
    for number, wanted in enumerate(packer.argument_types):
        value = builder.load(builder.gep(entry.args[0], [word(number)]))
        flat.append(_narrow(builder, value, wanted))
    how, value = context.call_conv.call_function(
        builder, context.declare_function(module, overload.fndesc), returned, overload.signature.args,
        packer.from_arguments(builder, flat),
    )  # fmt: skip
    if isinstance(value.type, ir.IntType):
        builder.store(value if value.type == word else builder.zext(value, word), entry.args[1])
    builder.ret(builder.zext(how.is_error, status))
    return module


def _narrow(builder: Any, value: Any, wanted: Any) -> Any:
    """A word as what it was made of."""
    from llvmlite import ir

    if isinstance(wanted, ir.PointerType):
        return builder.inttoptr(value, wanted)
    if isinstance(wanted, ir.DoubleType):
        return builder.bitcast(value, wanted)
    if isinstance(wanted, ir.FloatType):
        return builder.bitcast(builder.trunc(value, ir.IntType(32)), wanted)
    return value if value.type == wanted else builder.trunc(value, wanted)
