"""Gram matrices of the inputs that a torch model's weights are multiplied with, for any kind of module.

Calls of torch's functions are intercepted, not modules: so linear layers, single experts of a tensor that stacks all of
them, and convolutions (unfolded to matrix products) are all covered.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

#: PEFT inserts it between the name of a layer and that of its weight.
WRAPPED = ".base_layer."
WEIGHT = ".weight"


class SeenInputs:
    """Sums XᵀX for every weight that is multiplied by inputs X.

    Args:
        torch: The module ``torch``.
        model: A ``torch.nn.Module``.

    Attributes:
        grams: float32 tensors by the name of the module, or of the tensor that stacks experts, of shape
            (experts, inputs, inputs); experts is 1 for all other modules.
        shapes: Their shapes, for all modules that were called.
    """

    def __init__(self, torch: Any, model: Any) -> None:
        self._torch = torch
        self.grams: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        #: Which modules are summed (None: all), and whether any is.
        self._names: Collection[str] | None = None
        self._sums = True
        #: The inputs of each call of a module, by number; the input of the last call, with its number and version.
        self._calls: dict[str, list[int]] = {}
        self._last: tuple[Any, int, int] = (None, 0, 0)
        functional, tensor = torch.nn.functional, torch.Tensor
        products = dict.fromkeys((torch.matmul, tensor.matmul, tensor.__matmul__, torch.bmm, tensor.bmm, torch.mm))
        self._seen: Mapping[Any, Callable[..., None]] = {
            functional.linear: lambda x, weight, *_, **__: self._add(x, weight, weight.shape[-1]),
            **dict.fromkeys(products, lambda x, weight, *_, **__: self._add(x, weight, weight.shape[-2])),
            torch.addmm: lambda _, x, weight, **__: self._add(x, weight, weight.shape[-2]),
            torch.conv1d: self._convolve,
            torch.conv2d: self._convolve,
        }
        named = {each.data_ptr(): (name, each) for name, each in reversed([*model.named_parameters()])
                 if each.ndim > 1 and "lora_" not in name}  # fmt: skip
        self._starts = sorted(named)
        self._weights = [named[start] for start in self._starts]

    @property
    def aliases(self) -> dict[str, str]:
        """Modules that were only called with the inputs of another one, by name: the name of that one."""
        first: dict[tuple[tuple[int, int, int], tuple[int, ...]], str] = {}
        same = {name: first.setdefault((self.shapes[name], tuple(calls)), name) for name, calls in self._calls.items()}
        return {name: other for name, other in same.items() if name != other}

    @contextmanager
    def watching(self, names: Collection[str] | None = None, sums: bool = True) -> Iterator[None]:
        """Intercept torch's products while the context is active; gradients are off.

        Args:
            names: The modules whose Gram matrices are summed; None: all.
            sums: Whether to sum any; else only ``shapes`` and ``aliases`` are found.
        """
        self._names, self._sums = names, sums

        def see(
            _: Any, function: Any, __: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if function in self._seen:
                self._seen[function](*args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))

        mode: Any = type("Watching", (self._torch.overrides.TorchFunctionMode,), {"__torch_function__": see})
        with self._torch.no_grad(), mode():
            yield

    def _find(self, weight: Any) -> tuple[str, Any, int] | None:
        """The name of a weight, the parameter that it is or is a view of, and its offset in that, in elements."""
        at = bisect_right(self._starts, weight.data_ptr()) - 1
        if at < 0:
            return None
        name, whole = self._weights[at]
        before = (weight.data_ptr() - self._starts[at]) // whole.element_size()
        fits = before < whole.numel() and weight.dtype == whole.dtype
        return (name.replace(WRAPPED, ".").removesuffix(WEIGHT), whole, before) if fits else None

    def _add(self, x: Any, weight: Any, inputs: int) -> None:
        found = self._find(weight) if weight.ndim in (2, 3) else None
        if found is None or x.shape[-1] != inputs:
            return
        name, whole, before = found
        experts = whole.shape[0] if whole.ndim == 3 else 1
        shared = x if weight.numel() == whole.numel() else None
        if not self._note(name, (experts, inputs, inputs), x.device, shared):
            return
        gram = self.grams[name]
        if weight.ndim == 3:
            x = x.float().reshape(experts, -1, inputs)
            gram += x.transpose(1, 2) @ x
            return
        x = x.float().reshape(-1, inputs)
        gram[before * experts // whole.numel()] += x.T @ x

    def _note(self, name: str, shape: tuple[int, int, int], device: Any, x: Any) -> bool:
        """Note a call of a module; whether its Gram matrix, which is allocated, is to be summed.

        Args:
            name: The module's name.
            shape: The shape of its Gram matrix.
            device: Where that is.
            x: The input; None if no other module may share it.
        """
        if self.shapes.setdefault(name, shape) != shape:
            return False
        last, version, number = self._last
        # The last input is kept, so that no other tensor can have its address.
        if x is None or last is None or not _is_same(last, x) or version != x._version:
            number += 1
        self._last = x, 0 if x is None else x._version, number
        if not self._sums:
            self._calls.setdefault(name, []).append(number)
        if not self._sums or (self._names is not None and name not in self._names):
            return False
        if name not in self.grams:
            self.grams[name] = self._torch.zeros(shape, device=device)
        return True

    def _convolve(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        del bias
        found = self._find(weight)
        if found is None or groups != 1 or isinstance(padding, str):
            return
        if weight.ndim == 3:  # conv1d: an image of one row.
            x, kernel = x.unsqueeze(-2), (1, weight.shape[2])
            stride, padding, dilation = (
                (one, *_ints(each)) for one, each in ((1, stride), (0, padding), (1, dilation))
            )
        else:
            kernel = tuple(weight.shape[2:])
        width = weight.shape[1] * math.prod(kernel)
        if not self._note(found[0], (1, width, width), x.device, None):
            return
        unfold = self._torch.nn.functional.unfold
        columns = unfold(x.float(), kernel, dilation=dilation, padding=padding, stride=stride)
        columns = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        self.grams[found[0]][0] += columns.T @ columns


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tensors are the same elements."""
    return bool(
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _ints(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
