"""A GPU for Paddle that is none: as :mod:`pretended_gpu` for torch, for what Paddle would punish.

Operations are Paddle's own on the CPU. These are errors:

- a tensor of the host among those on the device;
- what a thread makes before it has chosen the device, which is each thread's own, among those on the device;
- an operand that is a Python number, which the kernels never give Paddle;
- pinned memory that is given up while a copy from it is under way.

There is one stream for all threads, so tensors may go from one thread to another.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from modelfuse.kernels.backends import import_library

GPU, PINNED = "gpu:0", "pinned"
OPERATORS = (
    "add", "sub", "mul", "truediv", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "abs",
)  # fmt: skip


class Placed:
    """A tensor on the device or in pinned memory.

    Attributes:
        behind: Its values, which lie in the host's memory.
        place: ``gpu:0`` or ``pinned``.
    """

    def __init__(self, behind: Any, place: str, gpu: PretendedPaddleGpu) -> None:
        self.behind, self.place, self._gpu = behind, place, gpu

    @property
    def shape(self) -> list[int]:
        """As the tensor's; so are type and number of dimensions."""
        return list(self.behind.shape)

    @property
    def dtype(self) -> Any:
        return self.behind.dtype

    def numpy(self) -> Any:
        """A copy on the host, when the stream has come to it."""
        assert self.place == GPU
        self._gpu.synchronize()
        return self.behind.numpy().copy()

    def _copy_to(self, place: str, blocking: bool) -> Placed:
        assert (self.place, place, blocking) == (PINNED, GPU, False)
        self._gpu.under_way(self)
        return Placed(self.behind.clone(), GPU, self._gpu)

    def __getitem__(self, places: slice | tuple[slice, ...]) -> Placed:
        return Placed(self.behind[places], self.place, self._gpu)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.behind, name)
        return self._gpu.on_device(getattr(type(self.behind), name), self) if callable(value) else value


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Placed, *others: Any) -> Any:
        assert all(isinstance(each, Placed) for each in others), f"{name}: a number, or a tensor of the host"
        return self._gpu.on_device(getattr(type(self.behind), name), self)(*others)

    return operate


for _name in OPERATORS:
    setattr(Placed, f"__{_name}__", _operator(f"__{_name}__"))


class PretendedPaddleGpu:
    """The device.

    Attributes:
        copies: How many there were from pinned memory.
    """

    def __init__(self) -> None:
        self.copies = 0
        self._paddle = import_library("paddle")
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._pinned: list[weakref.ref[Placed]] = []

    def module(self) -> Any:
        """The module as it would be where there is this GPU."""
        own = {
            "CUDAPlace": lambda number: f"gpu:{number}",
            "CUDAPinnedPlace": lambda: PINNED,
            "set_device": self._set_device,
            "to_tensor": self._to_tensor,
            "no_grad": self._paddle.no_grad,
            "__version__": self._paddle.__version__,
            "device": SimpleNamespace(
                is_compiled_with_cuda=lambda: True,
                cuda=SimpleNamespace(device_count=lambda: 1),
                synchronize=self.synchronize,
            ),
        }
        gpu = self

        class Module:
            def __getattr__(self, name: str) -> Any:
                return own[name] if name in own else gpu.on_device(getattr(gpu._paddle, name))

        return Module()

    def under_way(self, pinned: Placed) -> None:
        """A copy from pinned memory begins."""
        with self._lock:
            self.copies += 1
            self._pinned.append(weakref.ref(pinned))

    def synchronize(self) -> None:
        """Wait for all copies."""
        with self._lock:
            assert all(each() for each in self._pinned), "pinned memory was given up while a copy from it was under way"
            self._pinned.clear()

    def on_device(self, function: Callable[..., Any], *first: Placed) -> Callable[..., Any]:
        """A function of Paddle's for tensors on the device, or for what it makes on the thread's device."""

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors: list[Any] = []
            args, kwargs = self._behind((*first, *args), tensors), self._behind(kwargs, tensors)
            assert len({getattr(each, "place", None) for each in tensors}) < 2, (
                f"{function}: tensors of host and device"
            )
            result = function(*args, **kwargs)
            there = isinstance(tensors[0], Placed) if tensors else getattr(self._thread, "device", "cpu") == GPU
            return Placed(result, GPU, self) if there else result

        return call

    def _behind(self, value: Any, tensors: list[Any]) -> Any:
        """The values behind all tensors of some arguments; the tensors are added to a list."""
        if isinstance(value, list | tuple):
            return type(value)(self._behind(each, tensors) for each in value)
        if isinstance(value, dict):
            return {name: self._behind(each, tensors) for name, each in value.items()}
        if isinstance(value, Placed):
            assert value.place == GPU, "pinned memory where the device's is wanted"
            tensors.append(value)
            return value.behind
        if isinstance(value, self._paddle.Tensor):
            tensors.append(value)
        return value

    def _set_device(self, name: str) -> None:
        self._thread.device = name

    def _to_tensor(self, values: Any, place: str) -> Placed:
        assert place in (GPU, PINNED)
        return Placed(self._paddle.to_tensor(values, place=self._paddle.CPUPlace()), place, self)
