"""Choosing the kernels: tensor_type and device from the command line to the bytes; what is said if one is missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import STEPS, bf16, call, make_model, read_model
from simulated_gpu import SimulatedGpu
from simulated_paddle_gpu import SimulatedPaddleGpu

import modelfuse as package
from modelfuse.dtypes import F32
from modelfuse.errors import ModelfuseError, _installed_from
from modelfuse.kernels import backends
from modelfuse.kernels.arrays.device_algebra import DeviceAlgebra
from modelfuse.kernels.arrays.torch import TorchLibrary
from modelfuse.kernels.backends import LIBRARIES, Device, choose
from modelfuse.kernels.tolerance import apart
from modelfuse.planning.memory_budget import GPU_WORKERS, GRAIN, LEAST_GPU_WORKER_BYTES, MemoryDemand, fit_memory
from modelfuse.recipe.recipe import Recipe

Run = Callable[..., Any]
Pair = tuple[Path, Path]
TENSOR_TYPES = [*LIBRARIES]
#: What a machine with a GPU has; imports nothing.
GPU = ("pt", "gpu"), ("pt", "low_gpu_mem"), ("pd", "gpu"), ("pd", "low_gpu_mem")
#: Three models of a large tensor, eight bytes an element in all.
DEMAND = MemoryDemand(outputs=10, sources=3, sizes=frozenset({(1 << 24, 0, 8)}), a_reader=0, held=0, double=False)


def without_gpu(tensor_type: str) -> bool:
    return not backends.find_gpu(tensor_type, "gpu", allow_cpu_fallback=True)


@pytest.fixture
def trio(tmp_path: Path) -> list[Path]:
    """Three models and their base; two tensors are larger than a slice of the smallest budget."""
    random = np.random.default_rng(6)
    base = {"a.weight": random.normal(0, 0.02, (GRAIN + 5,)), "b.weight": random.normal(0, 0.02, (2, GRAIN // 2 + 9)),
            "c.weight": random.normal(0, 0.02, (3, 7))}  # fmt: skip
    folders = []
    for number in range(4):
        tensors = {name: bf16(each + number * random.normal(0, 1e-3, each.shape)) for name, each in base.items()}
        folders.append(make_model(tmp_path / f"m{number}", tensors))
    return folders


@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
def test_every_tensor_type_merges_the_same_bytes(
    merge: Run, trio: list[Path], tmp_path: Path, steps: list[str]
) -> None:
    models = trio[1:3] if "slerp" in steps else trio[1:]
    for tensor_type in ("np", *TENSOR_TYPES):
        merge("--model_path_list", *models, "--base_model_path", trio[0], *steps, "--output_path",
              tmp_path / tensor_type, "--tensor_type", tensor_type, "--n_process", 2)  # fmt: skip
    expected = read_model(tmp_path / "np")
    assert all(read_model(tmp_path / tensor_type) == expected for tensor_type in TENSOR_TYPES)
    report, other = (json.loads((tmp_path / each / "merge_report.json").read_text()) for each in ("np", "pt"))
    assert report["tensors"] == other["tensors"]


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
def test_workers_and_budget_change_no_byte(trio: list[Path], tmp_path: Path, tensor_type: str) -> None:
    made = []
    budgets: list[dict[str, Any]] = [{}, {"n_process": 5}, {"n_process": 2, "memory": 1}]
    for number, settings in enumerate(budgets):
        out = tmp_path / str(number)
        package.merge(model_path_list=trio[1:], base_model_path=trio[0], merge_method="della", output_path=out,
                      tensor_type=tensor_type, **settings)  # fmt: skip
        made.append(read_model(out))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
def test_an_output_is_verified_with_the_library_that_made_it(
    modelfuse: Run, merge: Run, pair: Pair, tmp_path: Path, tensor_type: str
) -> None:
    merge("--model_path_list", *pair, "--merge_method", "dare_ties", "--output_path", tmp_path / "C",
          "--tensor_type", tensor_type)  # fmt: skip
    assert modelfuse("verify", tmp_path / "C", "--full").status == 0


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
def test_nonfinite_values_and_overflows_are_refused(refuse: Run, tmp_path: Path, tensor_type: str) -> None:
    one, two = np.ones(9, np.float32), np.full(9, 60000, np.float32)
    one[4] = np.nan
    words = [make_model(tmp_path / "A", {"w": one}), make_model(tmp_path / "B", {"w": two}), "--output_path",
             tmp_path / "C", "--tensor_type", tensor_type]  # fmt: skip
    refuse("merge", "--model_path_list", *words, says=["'w'", tmp_path / "A", "NaN"], hint="propagate")
    words[0] = words[1]
    refuse("merge", "--model_path_list", *words, "--output_dtype", "float16", "--weight_list", 1, 1,
           says=["'w'", "overflows", "9 elements"], hint="propagate")  # fmt: skip


# What is imported


@pytest.mark.parametrize(("tensor_type", "loaded"), [("np", ""), ("pt", "torch"), ("pd", "paddle")])
def test_only_what_is_asked_for_is_imported(pair: Pair, tmp_path: Path, tensor_type: str, loaded: str) -> None:
    code = (
        "import sys, warnings, modelfuse\n"
        f"modelfuse.merge(model_path_list={[str(each) for each in pair]!r}, output_path={str(tmp_path / 'C')!r}, "
        f"tensor_type={tensor_type!r}, merge_method='ties')\n"
        "print(*sorted({'torch', 'paddle'} & set(sys.modules)))"
    )
    said = call(code=code)
    assert said.status == 0, said.err
    assert said.out.split() == loaded.split()


def test_a_plan_for_the_cpu_imports_no_library(pair: Pair) -> None:
    code = (
        "import sys, modelfuse\n"
        f"plan = modelfuse.check(model_path_list={[str(each) for each in pair]!r}, tensor_type='pt')\n"
        "print(plan.device.tensor_type, 'torch' in sys.modules)"
    )
    assert call(code=code).out.split() == ["pt", "False"]


# What is missing


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_library_that_is_not_installed(
    refuse: Run, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, tensor_type: str
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    name = LIBRARIES[tensor_type].module
    refuse(command, "--model_path_list", *pair, "--output_path", tmp_path / "C", "--tensor_type", tensor_type,
           says=[f"tensor_type {tensor_type} needs {name}, which is not installed"],
           hint=f"pip install '{_installed_from()}[{name}]'")  # fmt: skip


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(backends, "import_module", broken)
    with pytest.raises(package.MissingExtraError, match=r"torch is installed, but cannot be imported: libcudart"):
        choose(Device("pt"))


@pytest.mark.parametrize(("tensor_type", "device"), GPU)
def test_a_library_without_gpus(refuse: Run, pair: Pair, tmp_path: Path, tensor_type: str, device: str) -> None:
    """As it is where the tests run on the CPU."""
    if not without_gpu(tensor_type):
        pytest.skip(f"{LIBRARIES[tensor_type].module} has a GPU here")
    refuse("merge", "--model_path_list", *pair, "--output_path", tmp_path / "C", "--tensor_type", tensor_type,
           "--device", device, says=[f"device {device}: {LIBRARIES[tensor_type].module}"],
           hint="--allow_cpu_fallback")  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, built: bool = True) -> None:
    """torch as it would be elsewhere."""
    cuda = SimpleNamespace(device_count=lambda: gpus)
    version = SimpleNamespace(cuda="12.8" if built else None, hip=None)
    torch = SimpleNamespace(cuda=cuda, version=version, __version__="2.13.0")
    monkeypatch.setattr(backends, "import_module", lambda name: torch)


def test_a_library_for_gpus_that_finds_none(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0)
    with pytest.raises(package.RecipeError, match=r"device gpu: torch 2\.13\.0 finds no GPU"):
        package.check(model_path_list=pair, tensor_type="pt", device="gpu")


def test_a_library_that_was_built_without_gpus_names_what_to_install(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 0, built=False)
    with pytest.raises(package.MissingExtraError, match=r"built without support for GPUs") as raised:
        package.check(model_path_list=pair, tensor_type="pt", device="low_gpu_mem")
    assert f"'{_installed_from()}[torch]'" in str(raised.value.hint)


@pytest.mark.parametrize(("tensor_type", "device"), GPU)
def test_the_cpu_does_the_work_where_that_is_asked_for(
    modelfuse: Run, merge: Run, pair: Pair, tmp_path: Path, tensor_type: str, device: str
) -> None:
    if not without_gpu(tensor_type):
        pytest.skip(f"{LIBRARIES[tensor_type].module} has a GPU here")
    words = ["--model_path_list", *pair, "--output_path", tmp_path / "C", "--tensor_type", tensor_type,
             "--device", device, "--allow_cpu_fallback"]  # fmt: skip
    said = modelfuse("check", *words).out
    assert "the merge runs on the CPU" in said
    assert f"{LIBRARIES[tensor_type].module} tensors on the CPU" in said
    merge(*words)
    config = json.loads((tmp_path / "C" / "merge_config.json").read_text())
    assert (config["device"], config["tensor_type"]) == (device, tensor_type)


def test_numpy_has_no_gpu_even_where_the_cpu_is_allowed(refuse: Run, pair: Pair, tmp_path: Path) -> None:
    words = ["--model_path_list", *pair, "--output_path", tmp_path / "C", "--device", "gpu", "--allow_cpu_fallback"]
    refuse("merge", *words, says=["tensor_type np computes on the CPU"], hint="--tensor_type pt or pd")


def test_a_verification_elsewhere_falls_back_to_the_cpu(modelfuse: Run, merge: Run, pair: Pair, tmp_path: Path) -> None:
    """What a GPU merged can be checked where there is none."""
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C", "--tensor_type", "pt", "--device", "gpu",
          "--allow_cpu_fallback")  # fmt: skip
    said = modelfuse("verify", tmp_path / "C", "--full")
    assert said.status == 0, said


# Memory


def recipe(**settings: Any) -> Recipe:
    return Recipe.parse({"model_path_list": ["A", "B"], "merge_method": "ties", **settings})


def test_a_library_s_own_memory_is_planned() -> None:
    peaks = [fit_memory(recipe(tensor_type=each), DEMAND).memory for each in ("np", *TENSOR_TYPES)]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3


def test_a_gpu_has_workers_to_read_and_write_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)
    budget = fit_memory(recipe(tensor_type="pt", device="gpu"), DEMAND)
    assert budget.device.gpu
    assert budget.workers == GPU_WORKERS
    assert fit_memory(recipe(tensor_type="pt", device="gpu", n_process=7, memory="4GB"), DEMAND).workers == 7


@pytest.mark.parametrize("gpu_memory", ["64MB", "256MB", "1GB"])
@pytest.mark.parametrize("n_process", [1, 4, 50])
def test_little_memory_of_a_gpu_is_shared_among_workers(
    monkeypatch: pytest.MonkeyPatch, gpu_memory: str, n_process: int
) -> None:
    pretend(monkeypatch, 1)
    wanted = recipe(tensor_type="pt", device="low_gpu_mem", gpu_memory=gpu_memory, n_process=n_process, memory="9GB")
    budget = fit_memory(wanted, DEMAND)
    assert budget.device.worker_bytes >= LEAST_GPU_WORKER_BYTES
    assert budget.device.worker_bytes * budget.workers <= wanted.gpu_memory


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
@pytest.mark.parametrize("device", ["gpu", "low_gpu_mem"])
@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
def test_a_gpu_merges_the_same_bytes(
    merge: Run, trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[str], device: str,
    tensor_type: str,
) -> None:  # fmt: skip
    """On a simulated one where there is none."""
    if without_gpu(tensor_type):
        simulated = (SimulatedGpu() if tensor_type == "pt" else SimulatedPaddleGpu()).module()
        monkeypatch.setattr(backends, "import_module", lambda name: simulated)
    models = trio[1:3] if "slerp" in steps else trio[1:]
    words = ["--model_path_list", *models, "--base_model_path", trio[0], *steps]
    merge(*words, "--output_path", tmp_path / "np")
    merge(*words, "--output_path", tmp_path / "C", "--tensor_type", tensor_type, "--device", device)
    assert read_model(tmp_path / "C") == read_model(tmp_path / "np")


def test_copies_are_under_way_while_a_gpu_computes(
    merge: Run, trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From and to pinned memory, and by several workers, each on a stream of its own."""
    gpu = SimulatedGpu()
    module = gpu.module()
    monkeypatch.setattr(backends, "import_module", lambda name: module)
    merge("--model_path_list", *trio[1:], "--base_model_path", trio[0], "--merge_method", "dare_ties",
          "--tensor_type", "pt", "--device", "gpu", "--output_path", tmp_path / "C")  # fmt: skip
    copies = [stream.copies for stream in gpu.streams]
    assert sum(copies) == 3 * (4 + 1)
    assert 1 < len(copies) <= GPU_WORKERS


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """A base and three models of it, with matrices of layers."""
    draw, shapes = np.random.default_rng(8), {"up_proj": (70, 40), "down_proj": (40, 70), "q_proj": (12, 64)}
    base = {f"model.layers.0.{name}.weight": draw.normal(0, 1, shape) for name, shape in shapes.items()}
    return [
        make_model(tmp_path / f"l{number}", {
            name: (each + number * draw.normal(0, 0.1, each.shape)).astype(np.float32) for name, each in base.items()
        })
        for number in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["gpu", "low_gpu_mem"])
@pytest.mark.parametrize("method", ["ridge", "iso_c", "iso_cts", "tsv_m", "swudi"])
def test_whole_matrices_are_merged_on_a_gpu(
    merge: Run, layers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, device: str
) -> None:
    """Within the tolerance that the report names."""
    gpu, done = SimulatedGpu(), Counter[str]()
    for name in ("product", "eigh", "solve"):
        function = vars(DeviceAlgebra)[name]
        monkeypatch.setattr(
            DeviceAlgebra, name, lambda *args, name=name, function=function: (done.update([name]), function(*args))[1]
        )
    words = ["--model_path_list", *layers[1:], "--base_model_path", layers[0], "--merge_method", method]
    merge(*words, "--output_path", tmp_path / "np")
    assert not done
    if without_gpu("pt"):
        module = gpu.module()
        monkeypatch.setattr(backends, "import_module", lambda name: module)
    merge(*words, "--output_path", tmp_path / "C", "--tensor_type", "pt", "--device", device)
    assert done.keys() == {"product", "solve" if method == "ridge" else "eigh"}
    found, expected = read_model(tmp_path / "C"), read_model(tmp_path / "np")
    for name, values in expected.items():
        one, other = (np.frombuffer(each.data, np.uint8) for each in (found[name], values))
        assert not apart(one, other, F32, 1e-5).any()
    assert package.verify(tmp_path / "C", full=True).holds


def test_matrices_that_a_gpu_cannot_hold_are_cut_or_left_to_the_processor() -> None:
    torch = pytest.importorskip("torch", reason="computes on a simulated GPU")
    library = TorchLibrary(torch if not without_gpu("pt") else SimulatedGpu().module(), True, 1 << 20, 1 << 10)
    draw = np.random.default_rng(0)
    root = draw.standard_normal((30, 30))
    matrix, right = root @ root.T + np.eye(30), draw.standard_normal((30, 8))
    for most in (None, 20_000, 2000, 64):
        algebra = DeviceAlgebra(library, torch if not without_gpu("pt") else SimulatedGpu().module(), most)
        np.testing.assert_allclose(algebra.product(root.T, root), root.T @ root, atol=1e-12)
        np.testing.assert_allclose(algebra.product(root, right), root @ right, atol=1e-12)
        np.testing.assert_allclose(algebra.solve(matrix, right), np.linalg.solve(matrix, right), atol=1e-9)
        np.testing.assert_allclose(algebra.inverse(matrix), np.linalg.inv(matrix), atol=1e-9)
        np.testing.assert_allclose(algebra.eigh(matrix)[0], np.linalg.eigh(matrix)[0], atol=1e-9)
        assert algebra.product(root[:, :0], right[:0]).tolist() == np.zeros((30, 8)).tolist()
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        DeviceAlgebra(library, torch, None).solve(-matrix, right)


def test_a_gpu_without_enough_memory_is_told() -> None:
    torch = pytest.importorskip("torch", reason="computes on a simulated GPU")

    def full(matrix: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = SimulatedGpu().module()
    algebra = DeviceAlgebra(TorchLibrary(module, True, 1, 1), SimpleNamespace(linalg=SimpleNamespace(eigh=full)), None)
    with pytest.raises(ModelfuseError, match="memory of the GPU") as error:
        algebra.eigh(np.eye(4))
    assert "low_gpu_mem" in str(error.value.hint)


def test_copies_are_under_way_while_paddle_s_gpu_computes(
    merge: Run, trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedPaddleGpu()
    module = gpu.module()
    monkeypatch.setattr(backends, "import_module", lambda name: module)
    merge("--model_path_list", *trio[1:], "--base_model_path", trio[0], "--merge_method", "dare_ties",
          "--tensor_type", "pd", "--device", "gpu", "--output_path", tmp_path / "C")  # fmt: skip
    assert gpu.copies == 3 * 4


def test_a_gpu_s_memory_is_bounded(merge: Run, trio: list[Path], tmp_path: Path) -> None:
    if without_gpu("pt"):
        pytest.skip("needs a GPU that torch can use")
    torch = backends.import_library("torch")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for number, method in enumerate(("ties", "della", "dare_ties")):
        merge("--model_path_list", *trio[1:], "--base_model_path", trio[0], "--merge_method", method, "--output_path",
              tmp_path / str(number), "--tensor_type", "pt", "--device", "low_gpu_mem")  # fmt: skip
    assert torch.cuda.max_memory_reserved() <= 256 * 10**6
