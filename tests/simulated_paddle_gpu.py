"""A simulated GPU for Paddle, like :mod:`simulated_gpu` for torch.

Operations are Paddle's own on the CPU. These are errors:

- operations on tensors of both host and device;
- operations on the device's tensors and those that a thread has created before it set the device;
- an operand that is a Python number, which the kernels never pass to Paddle;
- pinned memory that is released during a copy from it.

All threads share one stream, so tensors may be used by any thread.
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
        behind: Its values, in a tensor on the host.
        place: ``gpu:0`` or ``pinned``.
    """

    def __init__(self, behind: Any, place: str, gpu: SimulatedPaddleGpu) -> None:
        self.behind, self.place, self._gpu = behind, place, gpu

    @property
    def shape(self) -> list[int]:
        """The shape."""
        return list(self.behind.shape)

    @property
    def dtype(self) -> Any:
        return self.behind.dtype

    def numpy(self) -> Any:
        """A copy on the host, after all pending operations of the stream."""
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


class SimulatedPaddleGpu:
    """The device.

    Attributes:
        copies: The number of copies from pinned memory.
    """

    def __init__(self) -> None:
        self.copies = 0
        self._paddle = import_library("paddle")
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._pinned: list[weakref.ref[Placed]] = []

    def module(self) -> Any:
        """The module ``paddle`` with this GPU."""
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
        """Begin a copy from pinned memory."""
        with self._lock:
            self.copies += 1
            self._pinned.append(weakref.ref(pinned))

    def synchronize(self) -> None:
        """Wait for all copies."""
        with self._lock:
            assert all(each() for each in self._pinned), "pinned memory was released during a copy from it"
            self._pinned.clear()

    def on_device(self, function: Callable[..., Any], *first: Placed) -> Callable[..., Any]:
        """A function of Paddle that takes and creates tensors on the device of its arguments or of the thread."""

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
        """Arguments with their tensors replaced by those on the host; the tensors are appended to a list."""
        if isinstance(value, list | tuple):
            return type(value)(self._behind(each, tensors) for each in value)
        if isinstance(value, dict):
            return {name: self._behind(each, tensors) for name, each in value.items()}
        if isinstance(value, Placed):
            assert value.place == GPU, "pinned memory instead of the device's"
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
