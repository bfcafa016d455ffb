"""Time the reference work on every device of this machine, with every installed tensor library.

    python benchmarks/devices.py --workdir DIR --markdown -

For each method: whole merges (processes of their own, synced, as in ``run.py``), the kernels alone over slices in the
host's memory (including copies to and from a GPU), and arithmetic alone over slices that are on the device already.
Devices and libraries that are missing are skipped with a message.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernels import DTYPES, reference_work, stored_slice, time_passes
from reference import Shape, make_reference
from rich.console import Console
from rich.table import Table
from works import WORKS, modelfuse_command
from works import Work as Merge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modelfuse.errors import ModelfuseError
from modelfuse.kernels import Work
from modelfuse.kernels.backends import GPU_BLOCK, GPU_WORKER_BYTES, LIBRARIES, Device, choose, find_gpu
from modelfuse.kernels.kernel import ArrayKernel

HEADINGS = ("method", "device", "merge s", "merge GB/s", "kernels GB/s", "arithmetic GB/s")
console = Console(stderr=True)


def main(words: Sequence[str] | None = None) -> None:
    """Time the methods on all devices and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", type=Path, help="keeps the inputs for the next run")
    parser.add_argument("--methods", nargs="+", choices=WORKS, default=list(WORKS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--elements", type=int, default=64, help="of the kernels alone, in units of 2²⁰ (64)")
    parser.add_argument("--layers", type=int, default=24, help="of the reference model; fewer for a trial")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page")
    options = parser.parse_args(words)
    devices = list(available())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        make_reference(folder / "reference", Shape(layers=options.layers))
        rows = []
        for method in options.methods:
            for name, device in devices:
                console.print(f"{method} on {name}")
                merge = WORKS[method]
                seconds = statistics.median(
                    _merge(merge, folder, device, options.threads) for _ in range(options.repeat)
                )
                size = sum(path.stat().st_size for each in merge.inputs(folder / "reference")
                           for path in each.glob("*.safetensors"))  # fmt: skip
                size += (folder / "reference" / "base" / "model.safetensors").stat().st_size
                work = reference_work(merge, options.elements << 20, DTYPES["bfloat16"])
                alone = [_kernels(work, device, options, resident) for resident in (False, True)]
                rates = [f"{each:.1f}" if each else "–" for each in alone]
                rows.append((method, name, f"{seconds:.1f}", f"{size / 1e9 / seconds:.1f}", *rates))
    _show(rows, options.markdown)


def available() -> Iterator[tuple[str, Device]]:
    """Every available device with its name; prints why others are skipped."""
    yield "CPU, np", Device("np")
    for tensor_type in LIBRARIES:
        try:
            find_gpu(tensor_type, "cpu", allow_cpu_fallback=False)
            yield f"CPU, {tensor_type}", Device(tensor_type)
            find_gpu(tensor_type, "gpu", allow_cpu_fallback=False)
            device = Device(tensor_type, gpu=True, worker_bytes=GPU_WORKER_BYTES)
            yield f"{_gpu_name(device)}, {tensor_type}", device
        except ModelfuseError as error:
            console.print(f"left out: {error.message}")


def _gpu_name(device: Device) -> str:
    library: Any = __import__(device.library)
    return str(library.cuda.get_device_name() if device.tensor_type == "pt" else library.device.cuda.get_device_name())


def _merge(merge: Merge, folder: Path, device: Device, threads: int) -> float:
    """Seconds of a whole merge in a process of its own."""
    output = folder / "output"
    command = modelfuse_command(sys.executable, merge, folder / "reference", output, threads)
    command += ["--tensor_type", device.tensor_type, "--device", "gpu" if device.gpu else "cpu", "--overwrite"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[1])
    return time.perf_counter() - start


def _kernels(work: Work, device: Device, options: argparse.Namespace, resident: bool) -> float | None:
    """GB/s of the kernels or, if ``resident``, of arithmetic alone; None if the kernel has no library."""
    kernel = choose(device)
    if resident and not isinstance(kernel, ArrayKernel):
        return None
    if resident and isinstance(kernel, ArrayKernel):
        _keep(kernel)
    threads, step = (max(options.threads, 3), GPU_BLOCK) if device.gpu else (options.threads, 1 << 20)
    stored = stored_slice(work, step)
    with kernel.running():
        time_passes(work, threads, kernel, stored)
        best = min(sum(time_passes(work, threads, kernel, stored).values()) for _ in range(options.repeat))
    return work.size * (len(work.sources) + 1) * work.out.bytes / 1e9 / best


def _keep(kernel: ArrayKernel) -> None:
    """Make a library load each buffer only once, and store nothing."""
    library: Any = kernel.library
    load, loaded = library.load, {}

    def load_once(raw: Any, dtype: Any) -> Any:
        key = raw.ctypes.data, raw.size
        if key not in loaded:
            loaded[key] = load(raw, dtype)
        return loaded[key]

    def store_nothing(*_: Any) -> None:
        pass

    library.load, library.store = load_once, store_nothing


def _show(rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        for row in (HEADINGS, ("---",) * len(HEADINGS), *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
