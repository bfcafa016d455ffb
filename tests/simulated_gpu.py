"""A simulated GPU for torch: separate device memory, streams, and asynchronous copies.

Operations are torch's own on the CPU. Mistakes that a GPU would reveal by chance only are errors:

- operations on tensors of both host and device, except copies between them;
- a tensor of one stream that is used on another, or without a stream;
- host memory that changes during a copy from it, or is used before a copy to it has ended;
- an asynchronous copy from or to memory that is not pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: The name of the device: one that every build of torch knows, and that has no memory.
NAME = "meta"
CPU = torch.device("cpu")
#: The bytes of host memory until a copy to it has ended.
NOT_YET = 0xA5


class OnDevice(torch.Tensor):
    """A tensor on the device.

    Attributes:
        behind: Its values, in a tensor on the host.
        stream: The stream that it was created on.
    """

    behind: torch.Tensor
    stream: Stream

    @staticmethod
    def __new__(cls, behind: torch.Tensor, stream: Stream) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, behind.shape, strides=behind.stride(), dtype=behind.dtype, device=torch.device(NAME)
        )
        made.behind, made.stream = behind, stream
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} with a tensor on the device, but on no stream")


class Stream:
    """A stream, which executes copies and operations in order.

    Attributes:
        copies: The number of asynchronous copies.
    """

    def __init__(self) -> None:
        self.copies = 0
        self._from_host: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._to_host: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self, host: torch.Tensor) -> torch.Tensor:
        """Begin a copy from the host."""
        first, last = host.data_ptr(), host.data_ptr() + host.nbytes
        for other, _ in self._to_host:
            apart = other.data_ptr() + other.nbytes <= first or last <= other.data_ptr()
            assert apart, "host memory is read while a copy to it is under way"
        self._from_host.append((host, host.clone()))
        self.copies += 1
        return self._from_host[-1][1]

    def store(self, host: torch.Tensor, behind: torch.Tensor) -> None:
        """Begin a copy to the host."""
        host.fill_(NOT_YET)
        self._to_host.append((host, behind.clone()))
        self.copies += 1

    def synchronize(self) -> None:
        """Finish all pending copies."""
        for host, behind in self._from_host:
            same = torch.equal(host.view(torch.uint8), behind.view(torch.uint8))  # As bytes: NaN ≠ NaN.
            assert same, "host memory has changed while a copy from it was under way"
        for host, behind in self._to_host:
            assert bool((host == NOT_YET).all()), "host memory was written to while a copy to it was under way"
            host.copy_(behind)
        self._from_host.clear()
        self._to_host.clear()


class SimulatedGpu:
    """The device.

    Args:
        pinned: Whether asynchronous copies must be from and to pinned memory.

    Attributes:
        streams: All streams.
    """

    def __init__(self, pinned: bool = True) -> None:
        self.streams: list[Stream] = []
        self._strict = pinned
        self._pinned: list[torch.Tensor] = []

    def module(self) -> Any:
        """The module ``torch`` with this GPU."""
        own = {
            "cuda": SimpleNamespace(device_count=lambda: 1, Stream=self._stream, stream=self._on),
            "version": SimpleNamespace(cuda="13.0", hip=None),
            "device": lambda name: torch.device(NAME if name == "cuda" else name),
            "empty": self._empty,
        }

        class Module:
            def __getattr__(self, name: str) -> Any:
                return own[name] if name in own else getattr(torch, name)

        return Module()

    def _empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        if pin_memory:
            self._pinned.append(made)
        return made

    def copies(self, host: torch.Tensor) -> bool:
        """Whether it can copy from and to a tensor asynchronously: all of that is in pinned memory."""
        if not self._strict:
            return True
        first, last = host.data_ptr(), host.data_ptr() + host.nbytes
        return any(each.data_ptr() <= first and last <= each.data_ptr() + each.nbytes for each in self._pinned)

    def _stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        with _Operations(self, stream):
            yield


class _Operations(TorchDispatchMode):
    """Directs all operations of a thread to one stream."""

    def __init__(self, gpu: SimulatedGpu, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu, self._stream = gpu, stream

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # Composite operations are decomposed.
            if (result := function.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = [each for each in tensors if isinstance(each, OnDevice)]
        for each in there:
            assert each.stream is self._stream, f"{function}: a tensor of another stream, which may not be ready yet"
        name, to = function._schema.name, kwargs.get("device")
        if name == "aten::_to_copy" and to is not None:
            return self._copied(*args, **kwargs)
        if name == "aten::copy_" and tensors[1:] == there:
            return self._store(*args)
        if not there and (to is None or to == CPU):
            return function(*args, **kwargs)
        assert len(there) == len(tensors), f"{function}: tensors of the host and of the device"
        if to is not None:
            kwargs["device"] = CPU
        args, kwargs = tree_map(lambda each: each.behind if isinstance(each, OnDevice) else each, (args, kwargs))
        return tree_map(self._made, function(*args, **kwargs))

    def _made(self, each: Any) -> Any:
        return OnDevice(each, self._stream) if isinstance(each, torch.Tensor) else each

    def _copied(
        self, x: torch.Tensor, device: torch.device, dtype: Any = None, non_blocking: bool = False, **others: Any
    ) -> torch.Tensor:
        """Copy from the host to the device, or back; a synchronous copy finishes all pending ones."""
        assert dtype in (None, x.dtype), "copied and cast in one"
        assert others.keys() <= {"layout", "pin_memory", "memory_format"}
        assert isinstance(x, OnDevice) is (device == CPU), "copied to where it is"
        if isinstance(x, OnDevice):
            assert not non_blocking, "an asynchronous copy to new memory, whose end is unknown"
            self._stream.synchronize()
            return x.behind.clone()
        if non_blocking:
            assert self._gpu.copies(x), "a copy from memory that is not pinned"
            return OnDevice(self._stream.load(x), self._stream)
        return OnDevice(x.clone(), self._stream)

    def _store(self, host: torch.Tensor, x: OnDevice, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking, "waits for each copy"
        assert (host.shape, host.dtype) == (x.shape, x.dtype), "copied into something else"
        assert self._gpu.copies(host), "a copy to memory that is not pinned"
        self._stream.store(host, x.behind)
        return host
