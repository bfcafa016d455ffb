"""A pickle interpreter that only builds plain containers.

Python's unpickler imports and calls whatever a file names, so opening a checkpoint with it executes untrusted code.
This one looks names up in a table that its caller passes, and only calls functions of that table. Byte strings are not
loaded but become a ``ByteRange``, so that a checkpoint of many gigabytes is opened in milliseconds.

For any input, the outcome is a value or ``Refused``. Each opcode takes constant time and memory apart from its literal,
so the limits below bound the whole run.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping

from modelfuse.checkpoints.formats.byte_window import MAX_LITERAL, Window
from modelfuse.checkpoints.formats.pickle_types import NEVER_EXECUTED, Builder, ByteRange, Refused, Stateful, TextRange

#: An ordinary tensor takes about forty opcodes, so this allows for 100,000 tensors in one file.
MAX_OPCODES = 4_000_000
MAX_STACK = 1_000_000
MAX_MARKS = 1_000
MAX_LITERAL_TOTAL = 64 << 20
MAX_INTEGER_BYTES = 16


Handler = Callable[["PickleMachine"], None]
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_HANDLERS: dict[int, Handler] = {}


def _on(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update((_CODES[name], handler) for name in names)
        return handler

    return register


class PickleMachine:
    """Reads one pickle (protocols 2 to 5) from a window of a file.

    Args:
        window: The window to read from; positioned after the pickle afterwards.
        known: The allowed globals: ``"module name"`` → a :class:`Builder`, or any other value, which replaces the
            global and cannot be called.
        persistent: Converts a persistent id; without it, these are refused.
    """

    def __init__(
        self,
        window: Window,
        known: Mapping[str, object],
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        self._window = window
        self._known = known
        self._persistent = persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._literals_left = MAX_LITERAL_TOTAL

    def load(self) -> object:
        """Run the pickle and return its value.

        Raises:
            Refused: If it is malformed, truncated, exceeds a limit, or uses a global that is not in the table.
        """
        read, stack, stop = self._window.byte, self._stack, _CODES["STOP"]
        for _ in range(MAX_OPCODES):
            code = read()
            if code == stop:
                return self._pop()
            handler = _HANDLERS.get(code)
            if handler is None:
                name = _NAMES.get(code, f"0x{code:02x}")
                raise Refused(f"byte {self._window.position - 1:,} is {name}, no opcode of a checkpoint")
            handler(self)
            if len(stack) > MAX_STACK:
                raise Refused(f"its pickle stacks more than {MAX_STACK:,} values")
        raise Refused(f"its pickle has more than {MAX_OPCODES:,} opcodes")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        self._top()
        return self._stack.pop()

    def _top(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refused(f"its pickle takes from an empty stack at byte {self._window.position:,}")
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise Refused(f"its pickle has no mark for byte {self._window.position:,}")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # Numbers and constants

    def _integer(self, size: int) -> None:
        if size > MAX_INTEGER_BYTES:
            raise Refused(f"its pickle holds an integer of {size} bytes")
        self._push(int.from_bytes(self._window.take(size), "little", signed=True))

    @_on("BINFLOAT")
    def _float(self) -> None:
        self._push(struct.unpack(">d", self._window.take(8))[0])

    # Strings

    def _text(self, length: int) -> None:
        if length > MAX_LITERAL:
            self._push(TextRange(self._window.skip(length), length))
            return
        self._literals_left -= length
        if self._literals_left < 0:
            raise Refused(f"its pickle holds more than {MAX_LITERAL_TOTAL:,} bytes of text")
        try:
            self._push(self._window.take(length).decode())
        except UnicodeDecodeError:
            raise Refused(f"the text before byte {self._window.position:,} is not UTF-8") from None

    def _span(self, length: int) -> None:
        self._push(ByteRange(self._window.skip(length), length))

    # Containers

    @_on("MARK")
    def _mark(self) -> None:
        if len(self._marks) >= MAX_MARKS:
            raise Refused(f"its pickle nests more than {MAX_MARKS:,} containers")
        self._marks.append(len(self._stack))

    @_on("TUPLE", "FROZENSET")
    def _tuple(self) -> None:
        self._push(tuple(self._pop_mark()))

    @_on("TUPLE1")
    def _tuple1(self) -> None:
        self._push((self._pop(),))

    @_on("TUPLE2")
    def _tuple2(self) -> None:
        second, first = self._pop(), self._pop()
        self._push((first, second))

    @_on("TUPLE3")
    def _tuple3(self) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self._push((first, second, third))

    @_on("APPEND")
    def _append(self) -> None:
        self._extend([self._pop()])

    @_on("APPENDS", "ADDITEMS")
    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[object]) -> None:
        target = self._top()
        # Sets are stored as lists: members are never looked up, and hashing nested tuples can take exponential time.
        if type(target) is not list:
            raise Refused(f"its pickle appends to a {type(target).__name__}")
        target.extend(items)

    @_on("SETITEM")
    def _setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    @_on("SETITEMS")
    def _setitems(self) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise Refused(f"its pickle sets items of a {type(target).__name__}")
        for key in items[::2]:
            # Only keys whose hashes a file cannot make collide, which would take quadratic time.
            if not (type(key) in (str, bool) or key is None or (type(key) is int and abs(key) < 2**60)):
                raise Refused(f"a dict in it has a {type(key).__name__} as a key")
        target.update(zip(items[::2], items[1::2], strict=True))

    @_on("POP")
    def _discard(self) -> None:
        self._pop()

    @_on("POP_MARK")
    def _discard_to_mark(self) -> None:
        self._pop_mark()

    @_on("DUP")
    def _duplicate(self) -> None:
        self._push(self._top())

    # Memo

    @_on("MEMOIZE")
    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise Refused(f"its pickle recalls value {index}, which it never stored")
        self._push(self._memo[index])

    # Names, and what is built from them

    @_on("GLOBAL")
    def _global(self) -> None:
        module, name = self._window.line(), self._window.line()
        self._look_up(module, name)

    @_on("STACK_GLOBAL")
    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("its pickle names a global by something that is not text")
        self._look_up(module, name)

    def _look_up(self, module: str, name: str) -> None:
        key = f"{module} {name}"
        if key not in self._known:
            raise Refused(
                f"it asks for {f'{module}.{name}'[:200]!r}, which is no part of a plain checkpoint",
                NEVER_EXECUTED,
            )
        self._push(self._known[key])

    @_on("REDUCE", "NEWOBJ")
    def _reduce(self) -> None:
        arguments, builder = self._pop(), self._pop()
        if not isinstance(builder, Builder) or type(arguments) is not tuple:
            raise Refused("its pickle calls something that cannot be called", NEVER_EXECUTED)
        self._push(builder.build(arguments))

    @_on("BUILD")
    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Stateful):
            target.set_state(state)
        elif type(target) is not dict:  # a dict's state is the attributes of an OrderedDict: no entries
            raise Refused(f"its pickle sets the state of a {type(target).__name__}")

    @_on("BINPERSID")
    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise Refused("its pickle has persistent ids, which files of this kind never have")
        self._push(self._persistent(self._pop()))

    # Framing

    def _protocol(self, protocol: int) -> None:
        if not 2 <= protocol <= 5:
            raise Refused(f"its pickle has protocol {protocol}; only 2 to 5 are read")

    def _frame(self, length: int) -> None:
        # Frames only help a reader to read ahead; values are found without them.
        self._window.check_left(length)


def _constant(make: Callable[[], object]) -> Handler:
    return lambda machine: machine._push(make())


def _numbered(layout: str, act: Callable[[PickleMachine, int], None]) -> Handler:
    """The handler of an opcode with a numeric argument: a value, a length or an index."""
    if layout == "<B":
        return lambda machine: act(machine, machine._window.byte())
    form = struct.Struct(layout)
    return lambda machine: act(machine, form.unpack(machine._window.take(form.size))[0])


_on("NONE")(_constant(lambda: None))
_on("NEWTRUE")(_constant(lambda: True))
_on("NEWFALSE")(_constant(lambda: False))
_on("EMPTY_TUPLE")(_constant(tuple))
_on("EMPTY_LIST", "EMPTY_SET")(_constant(list))
_on("EMPTY_DICT")(_constant(dict))

_on("BININT1")(_numbered("<B", PickleMachine._push))
_on("BININT2")(_numbered("<H", PickleMachine._push))
_on("BININT")(_numbered("<i", PickleMachine._push))
_on("LONG1")(_numbered("<B", PickleMachine._integer))
_on("SHORT_BINUNICODE", "SHORT_BINSTRING")(_numbered("<B", PickleMachine._text))
_on("BINUNICODE", "BINSTRING")(_numbered("<I", PickleMachine._text))
_on("BINUNICODE8")(_numbered("<Q", PickleMachine._text))
_on("SHORT_BINBYTES")(_numbered("<B", PickleMachine._span))
_on("BINBYTES")(_numbered("<I", PickleMachine._span))
_on("BINBYTES8", "BYTEARRAY8")(_numbered("<Q", PickleMachine._span))
_on("BINPUT")(_numbered("<B", PickleMachine._put))
_on("LONG_BINPUT")(_numbered("<I", PickleMachine._put))
_on("BINGET")(_numbered("<B", PickleMachine._get))
_on("LONG_BINGET")(_numbered("<I", PickleMachine._get))
_on("PROTO")(_numbered("<B", PickleMachine._protocol))
_on("FRAME")(_numbered("<Q", PickleMachine._frame))
