"""A GPU for torch that is none: memory apart from the host's, streams, and copies that are under way for a while.

Operations are torch's own on the CPU. What a GPU would punish by chance is an error here, at once:

- a tensor of the host among those on the device, but for a copy from one to the other;
- a tensor that was made on one stream and is used on another, or on none;
- host memory that changes while a copy from it is under way, or that is used before a copy to it has ended;
- memory that is not pinned, where a copy is not to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: The device's name: one that torch knows everywhere, and that has no memory of its own.
NAME = "meta"
CPU = torch.device("cpu")
#: What host memory holds until a copy to it has ended.
NOT_YET = 0xA5


class OnDevice(torch.Tensor):
    """A tensor on the device.

    Attributes:
        behind: Its values.
        stream: What it was made on.
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
    """Copies and operations in an order.

    Attributes:
        copies: How many there were that nobody waited for one by one.
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
        """Wait for all that is under way."""
        for host, behind in self._from_host:
            same = torch.equal(host.view(torch.uint8), behind.view(torch.uint8))  # NaN and all.
            assert same, "host memory has changed while a copy from it was under way"
        for host, behind in self._to_host:
            assert bool((host == NOT_YET).all()), "host memory was written to while a copy to it was under way"
            host.copy_(behind)
        self._from_host.clear()
        self._to_host.clear()


class PretendedGpu:
    """The device.

    Args:
        pinned: Whether copies that are not to be waited for must be from and to pinned memory.

    Attributes:
        streams: All that were made.
    """

    def __init__(self, pinned: bool = True) -> None:
        self.streams: list[Stream] = []
        self._strict = pinned
        self._pinned: list[torch.Tensor] = []

    def module(self) -> Any:
        """The module as it would be where there is this GPU."""
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
        """Whether it copies from and to a tensor while its caller goes on: all of that lies in pinned memory."""
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
    """All operations of a thread, which go to one stream."""

    def __init__(self, gpu: PretendedGpu, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu, self._stream = gpu, stream

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # What is made of other operations, as what they are made of.
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
        """From the host to the device, or back: what is waited for has ended, and all before it."""
        assert dtype in (None, x.dtype), "copied and cast in one"
        assert others.keys() <= {"layout", "pin_memory", "memory_format"}
        assert isinstance(x, OnDevice) is (device == CPU), "copied to where it is"
        if isinstance(x, OnDevice):
            assert not non_blocking, "nobody knows when this copy has ended"
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
