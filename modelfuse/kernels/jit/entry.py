"""The entry point of a compiled kernel: its arguments are a row of words."""

from __future__ import annotations

from typing import Any


def entry_module(overload: Any, symbol: str) -> Any:
    """The LLVM module of the entry point: unpacks the argument words, calls the kernel and stores its result."""
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
    """Convert a word back to the type of the argument."""
    from llvmlite import ir

    if isinstance(wanted, ir.PointerType):
        return builder.inttoptr(value, wanted)
    if isinstance(wanted, ir.DoubleType):
        return builder.bitcast(value, wanted)
    if isinstance(wanted, ir.FloatType):
        return builder.bitcast(builder.trunc(value, ir.IntType(32)), wanted)
    return value if value.type == wanted else builder.trunc(value, wanted)
