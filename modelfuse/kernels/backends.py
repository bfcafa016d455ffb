"""Choose the kernel: compiled loops on the CPU, or torch or Paddle on the CPU or a GPU."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from modelfuse.errors import MissingExtraError, ModelfuseError, RecipeError
from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES
from modelfuse.kernels.kernel import ArrayKernel, CompiledKernel, Compiler, Kernel

if TYPE_CHECKING:
    pass

#: Memory in bytes that a worker may use on a GPU, and the elements of a block: whole slices.
GPU_WORKER_BYTES = 2_000_000_000
GPU_BLOCK = 1 << 22
INSTEAD = "Use --device cpu, or --allow_cpu_fallback to use a GPU only if there is one."


class Needed(NamedTuple):
    """The library that a tensor_type needs.

    Attributes:
        module: The module's name, which is also the name of modelfuse's extra.
        gpu: How to install it with GPU support.
    """

    module: str
    gpu: str


LIBRARIES = {
    "pt": Needed("torch", "Install torch with CUDA, as pytorch.org says, beside `pip install 'modelfuse[torch]'`."),
    "pd": Needed("paddle", "Install paddlepaddle-gpu, as paddlepaddle.org.cn says, instead of `modelfuse[paddle]`."),
}


class Device(Struct, frozen=True):
    """The device and library that tensors are merged with.

    Attributes:
        tensor_type: ``np``, ``pt`` or ``pd``.
        gpu: Whether to compute on a GPU.
        worker_bytes: Bytes of the device's memory that each worker may use.
    """

    tensor_type: str
    gpu: bool = False
    worker_bytes: int = CPU_WORKER_BYTES

    @property
    def library(self) -> str:
        """The name of the library: numpy, torch or paddle."""
        return LIBRARIES[self.tensor_type].module if self.tensor_type in LIBRARIES else "numpy"


def find_gpu(tensor_type: str, device: str, allow_cpu_fallback: bool) -> bool:
    """Whether to compute on a GPU. The library is imported only if a GPU is requested.

    Raises:
        MissingExtraError: If the library is not installed, or has no GPU support.
        RecipeError: If the library finds no usable GPU.
    """
    if tensor_type == "np":
        return False
    module, hint = LIBRARIES[tensor_type]
    if find_spec(module) is None:
        raise MissingExtraError(
            f"tensor_type {tensor_type} needs {module}, which is not installed",
            f"pip install 'modelfuse[{module}]', or use --tensor_type np: the same results on the CPU.",
        )
    if device == "cpu":
        return False
    problem = _gpu_problem(module, device, hint)
    if problem is not None and not allow_cpu_fallback:
        raise problem
    return problem is None


def _gpu_problem(module: str, device: str, hint: str) -> ModelfuseError | None:
    library = import_library(module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if module == "torch":
            built, number = library.version.cuda or library.version.hip, library.cuda.device_count()
        else:
            built = library.device.is_compiled_with_cuda() or library.device.is_compiled_with_rocm()
            number = library.device.cuda.device_count() if built else 0
    if not built:
        message = f"device {device}: {module} {library.__version__} is built without support for GPUs"
        return MissingExtraError(message, f"{hint} {INSTEAD}")
    if not number:
        reason = f" ({said[0].message})" if said else ""
        return RecipeError(f"device {device}: {module} {library.__version__} finds no GPU{reason}", INSTEAD)
    return None


def import_library(module: str) -> Any:
    """Import torch or Paddle.

    Raises:
        MissingExtraError: If it is installed, but cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as warnings about missing build tools for extensions.
            return import_module(module)
    except Exception as error:  # A broken library may raise anything.
        raise MissingExtraError(
            f"{module} is installed, but cannot be imported: {error}",
            f"Install it again: pip install --force-reinstall 'modelfuse[{module}]'.",
        ) from error


def choose(device: Device, compiler: Compiler | None = None) -> Kernel:
    """The kernel for a device; imports the library, if one is needed.

    Args:
        device: The device.
        compiler: Where missing kernels are compiled while numpy merges; None: wait until they are compiled.

    Raises:
        MissingExtraError: If the library cannot be imported.
    """
    if device.tensor_type == "np":
        if compiler is None:
            return CompiledKernel()
        from modelfuse.kernels.adaptive import AdaptiveKernel

        return AdaptiveKernel(compiler)
    library = import_library(device.library)
    most = GPU_BLOCK if device.gpu else CPU_BLOCK
    if device.tensor_type == "pt":
        from modelfuse.kernels.arrays.torch import TorchLibrary

        bounded = device.worker_bytes != GPU_WORKER_BYTES  # low_gpu_mem.
        return ArrayKernel(TorchLibrary(library, device.gpu, device.worker_bytes, most, bounded))
    from modelfuse.kernels.arrays.paddle import PaddleLibrary

    return ArrayKernel(PaddleLibrary(library, device.gpu, device.worker_bytes, most))
