"""Gram matrices of the inputs that a torch model's weights are multiplied with, for any kind of module.

Calls of torch's functions are intercepted, not modules: so linear layers, single experts of a tensor that stacks all of
them, and convolutions (unfolded to matrix products) are all covered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """

    def __init__(self, torch: Any, model: Any) -> None:
        self._torch = torch
        self.grams: dict[str, Any] = {}
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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept torch's products while the context is active; gradients are off."""

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
        if name not in self.grams:
            self.grams[name] = self._torch.zeros((experts, inputs, inputs), device=x.device)
        gram = self.grams[name]
        if gram.shape[-1] != inputs:
            return
        if weight.ndim == 3:
            x = x.float().reshape(experts, -1, inputs)
            gram += x.transpose(1, 2) @ x
            return
        x = x.float().reshape(-1, inputs)
        gram[before * experts // whole.numel()] += x.T @ x

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
        unfold = self._torch.nn.functional.unfold
        columns = unfold(x.float(), kernel, dilation=dilation, padding=padding, stride=stride)
        columns = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        name = found[0]
        gram = columns.T @ columns
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram[None]


def _ints(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
