"""What a merge leaves: the same bytes every time, every tensor accounted for, and a folder that can be served."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from conftest import STEPS, Said, Stored, array, bf16, make_model, random_tensors, read_file, read_model, snapshot
from definitions import MERGE_METHODS

import modelfuse as package
from modelfuse.methods.registry import PARAMETERS

Run = Callable[..., Said]
Pair = tuple[Path, Path]
WEIGHTS = "model.safetensors"


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
    return report


def checksum(data: bytes) -> str:
    """As modelfuse/storage/checksums.py defines it."""
    blocks = (data[start : start + 262144] for start in range(0, len(data), 262144))
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(block).digest() for block in blocks)).hexdigest()


def check_report(folder: Path, inputs: list[Path]) -> dict[str, Any]:
    """The report says the truth about the output, and misses nothing of the inputs."""
    report = report_of(folder)
    merged = read_model(folder)
    assert list(report["tensors"]) == list(merged)
    for name, entry in report["tensors"].items():
        assert entry["checksum"] == checksum(merged[name].data), name
        assert (entry["dtype"], tuple(entry["shape"])) == (merged[name].dtype, merged[name].shape)
        assert name in read_file(folder / entry["file"])[0]
        assert len(entry["source_dtypes"]) == len(inputs)
    assert report["checksum"] == "xxh3-128 of the xxh3-128 of every 256 KiB"
    assert report["files"] == {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    assert [entry["path"] for entry in report["inputs"]] == [str(path) for path in inputs]
    accounted = {*report["tensors"], *(entry["tensor"] for entry in report["left_out"])}
    for path, entry in zip(inputs, report["inputs"], strict=True):
        if entry["format"] == "safetensors":
            names = set(read_model(path))
            assert entry["tensors"] == len(names)
            assert names <= accounted
        for name, facts in entry["files"].items():
            assert facts["size"] == (path / name).stat().st_size
    for name, digest in report["sha256"].items():
        content = (folder / name).read_bytes()
        if name.endswith(".safetensors"):
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        assert digest == hashlib.sha256(content).hexdigest(), name
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {*report["sha256"], "merge_report.json"} == written
    own = dict(report)
    own.pop("report_sha256")
    text = json.dumps(own, indent=2, ensure_ascii=False) + "\n"
    assert report["report_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    return report


# The same bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models and a base with a tensor of several spans and a few small ones."""
    root = tmp_path_factory.mktemp("large")
    models = []
    for seed, name in enumerate(("A", "B", "base")):
        random = np.random.default_rng(seed)
        tensors: dict[str, np.ndarray | Stored] = {"big": bf16(random.standard_normal((700, 1001)))}
        tensors |= {f"small.{number}": random.standard_normal(2 + number).astype(np.float32) for number in range(9)}
        tensors |= {"half": random.standard_normal(999).astype(np.float16), "ids": np.arange(1000)}
        models.append(make_model(root / name, tensors))
    return models


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "alone"])
@pytest.mark.parametrize("method", MERGE_METHODS)
def test_same_bytes_for_any_workers_and_memory(
    large: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, with_base: bool
) -> None:
    monkeypatch.setattr("modelfuse.execution.run.SPAN", 1 << 18)
    settings: dict[str, Any] = {"model_path_list": large[:2], "merge_method": method}
    settings |= {"base_model_path": large[2]} if with_base else {}
    variants: list[dict[str, Any]] = [
        {},
        {"n_process": 2},
        {"n_process": 7},
        {"n_process": 2, "memory": 1},
        {"max_tensor_mem": 1e-9, "split_pieces": 1},
    ]
    outputs = set()
    for number, variant in enumerate(variants):
        out = tmp_path / str(number)
        package.merge(**settings, **variant, output_path=out)
        outputs.add((out / WEIGHTS).read_bytes())
    assert len(outputs) == 1
    report = check_report(tmp_path / "2", large if with_base else large[:2])
    assert report["tensors"]["ids"]["action"] == "copied"


def test_same_bytes_of_a_tensor_of_several_real_spans(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    models = [make_model(tmp_path / name, {"w": bf16(random.standard_normal(4_500_000))}) for name in "AB"]
    outputs = set()
    for workers in (1, 2):
        out = tmp_path / str(workers)
        package.merge(model_path_list=models, output_path=out, merge_method="dare_ties", n_process=workers)
        outputs.add((out / WEIGHTS).read_bytes())
    assert len(outputs) == 1


def test_a_seed_changes_draws_and_nothing_else_does(pair: Pair, tmp_path: Path) -> None:
    def merged(name: str, **settings: Any) -> bytes:
        package.merge(model_path_list=pair, output_path=tmp_path / name, **settings)
        return (tmp_path / name / WEIGHTS).read_bytes()

    first = merged("C", merge_method="dare_linear")
    assert merged("D", merge_method="dare_linear", seed=0) == first
    assert merged("E", merge_method="dare_linear", seed=1) != first
    assert merged("F", sparsify_type="dare", merge_type="linear") == first
    assert merged("G", merge_method="linear") == merged("H", merge_method="linear", seed=1)


def test_shards_change_no_tensor(pair: Pair, tmp_path: Path) -> None:
    for name, size in (("C", "5GB"), ("D", 250), ("E", 1)):
        package.merge(model_path_list=pair, output_path=tmp_path / name, merge_method="della", max_shard_size=size)
    assert read_model(tmp_path / "C") == read_model(tmp_path / "D") == read_model(tmp_path / "E")


@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tiny_tensors_with_every_method(merge: Run, tmp_path: Path, steps: list[str], dtype: str) -> None:
    """Without elements, without dimensions, with one element, all zero."""
    models = []
    for number, name in enumerate(("A", "B", "base")):
        values = {
            "empty": np.ones((0, 3)),
            "none": np.ones(0),
            "scalar": np.array(number + 0.5),
            "one": np.full(1, -number - 1.0),
            "zeros": np.zeros((2, 2)),
            "equal": np.ones(5),
            "few": np.arange(3.0) * number,
        }
        tensors = {key: bf16(each) if dtype == "bfloat16" else each.astype(dtype) for key, each in values.items()}
        models.append(make_model(tmp_path / name, tensors))
    for base in ([], ["--base_model_path", models[2]]):
        merge(
            "--model_path_list",
            *models[:2],
            *base,
            "--output_path",
            tmp_path / "C",
            "--overwrite",
            *steps,
            "--n_process",
            2,
        )
        merged = read_model(tmp_path / "C")
        assert {name: each.shape for name, each in merged.items()} == {
            name: each.shape for name, each in read_model(models[0]).items()
        }
        assert all(np.isfinite(array(each)).all() for each in merged.values())
        assert array(merged["zeros"]).tolist() == [[0, 0], [0, 0]]
        check_report(tmp_path / "C", models if base else models[:2])


# Types


def test_output_takes_the_types_of_its_lead(merge: Run, tmp_path: Path) -> None:
    """The base's, else the first model's, tensor by tensor."""
    a = make_model(tmp_path / "A", {"x": np.ones(3, np.float32), "y": bf16(np.ones(3)), "ids": np.arange(3)})
    b = make_model(tmp_path / "B", {"x": np.ones(3, np.float16), "y": np.full(3, 3, np.float64), "ids": np.arange(3)})
    base = make_model(tmp_path / "base", {"x": bf16(np.ones(3)), "y": np.ones(3, np.float32), "ids": np.arange(3)})
    out = ["--output_path", tmp_path / "C", "--overwrite"]

    def types() -> list[str]:
        return [each.dtype for _, each in sorted(read_model(tmp_path / "C").items())]

    merge("--model_path_list", a, b, *out)
    assert types() == ["I64", "F32", "BF16"]
    assert array(read_model(tmp_path / "C")["y"]).tolist() == [2, 2, 2]
    merge("--model_path_list", b, a, *out)
    assert types() == ["I64", "F16", "F64"]
    merge("--model_path_list", b, a, "--base_model_path", base, *out)
    assert types() == ["I64", "BF16", "F32"]
    for name, dtype in (("bfloat16", "BF16"), ("fp16", "F16"), ("float32", "F32"), ("float64", "F64")):
        merge("--model_path_list", a, b, *out, "--output_dtype", name)
        assert types() == ["I64", dtype, dtype]


def test_config_names_the_type_that_is_stored(merge: Run, tmp_path: Path) -> None:
    """A loader goes by config.json: with the base's type there it would round what --output_dtype kept."""
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "dtype": "bfloat16", "vocab_size": 3}
    models = [make_model(tmp_path / name, {"x": bf16(np.ones(3))}, config=config) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C", "--output_dtype", "float32")
    written = json.loads((tmp_path / "C" / "config.json").read_text())
    assert written == {**config, "torch_dtype": "float32", "dtype": "float32"}
    merge("--model_path_list", *models, "--output_path", tmp_path / "D")
    assert (tmp_path / "D" / "config.json").read_bytes() == (models[0] / "config.json").read_bytes()


# Files


def test_one_file_or_shards_as_hugging_face_names_them(merge: Run, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "C"
    words = ["--model_path_list", *pair, "--output_path", out, "--overwrite"]
    merge(*words)
    assert [path.name for path in sorted(out.glob("*safetensors*"))] == [WEIGHTS]
    whole = read_model(out)
    merge(*words, "--max_shard_size", "250")
    names = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert [path.name for path in sorted(out.glob("*safetensors*"))] == [*names, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(each.data) for each in whole.values())
    assert set(index["weight_map"]) == set(whole)
    assert read_model(out) == whole
    for name in names:
        tensors, metadata = read_file(out / name)
        assert sum(len(each.data) for each in tensors.values()) <= 250
        assert metadata == {"format": "pt"}
    check_report(out, list(pair))


def test_a_tensor_larger_than_a_shard_gets_its_own(merge: Run, pair: Pair, tmp_path: Path) -> None:
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C", "--max_shard_size", "1B")
    assert len(list((tmp_path / "C").glob("model-*-of-00005.safetensors"))) == 5
    assert len(read_model(tmp_path / "C")) == 5


def test_more_shards_than_files_may_be_open(merge: Run, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs limits of a process")
    models = [make_model(tmp_path / name, {str(each): np.ones(1, np.float32) for each in range(300)}) for name in "AB"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, hard))
    try:
        merge("--model_path_list", *models, "--output_path", tmp_path / "C", "--max_shard_size", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(read_model(tmp_path / "C")) == 300


@pytest.mark.parametrize("name", ["pt", "np", "flax"])
def test_metadata_is_kept(merge: Run, tmp_path: Path, name: str) -> None:
    metadata = {"format": name, "note": "Grüße"}
    models = [make_model(tmp_path / each, random_tensors(1), metadata=metadata) for each in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert read_file(tmp_path / "C" / WEIGHTS)[1] == metadata


def test_metadata_is_made_where_there_is_none(merge: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / each, random_tensors(1), metadata={}) for each in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert read_file(tmp_path / "C" / WEIGHTS)[1] == {"format": "pt"}


SERVED = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "tokenizer.model": "\0",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "vocab.txt": "a",
    "chat_template.jinja": "{{ x }}",
    "chat_template.json": "{}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "modeling_own.py": "x = 1",
    "tekken.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ y }}",
    "LICENSE": "text",
}
NOT_SERVED = {
    "optimizer.pt": "x", "training_args.bin": "x", "pytorch_model.bin": "x", "trainer_state.json": "{}",
    "model.gguf": "x", ".gitattributes": "x", "merge_report.json": "{}", "README.md": "the base's", "scheduler.pt": "x",
    "flax_model.msgpack": "x", "pytorch_model.bin.index.json": "{}",
}  # fmt: skip


def test_files_to_serve_come_along(merge: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, random_tensors(1), files={**SERVED, **NOT_SERVED}) for name in "AB"]
    base = make_model(tmp_path / "base", random_tensors(1), files={"tokenizer.json": '{"of": "the base"}'})
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    ours = {WEIGHTS, "README.md", "config.json", "merge_config.json", "merge_report.json", "additional_chat_templates"}
    assert set(snapshot(tmp_path / "C")) == {*SERVED, *ours}
    for name, content in SERVED.items():
        assert (tmp_path / "C" / name).read_text() == content
    assert "the base" not in (tmp_path / "C" / "README.md").read_text()
    assert set(report_of(tmp_path / "C")["copied_files"]) == {*SERVED, "config.json"}
    assert report_of(tmp_path / "C")["tensors"].keys() == random_tensors(1).keys()
    merge("--model_path_list", *models, "--base_model_path", base, "--output_path", tmp_path / "D")
    assert set(snapshot(tmp_path / "D")) == (ours | {"tokenizer.json"}) - {"additional_chat_templates"}
    assert (tmp_path / "D" / "tokenizer.json").read_text() == '{"of": "the base"}'


def test_modules_of_sentence_transformers_come_along(merge: Run, tmp_path: Path) -> None:
    """Those beside the transformer; weights that not all models have are copied; of other libraries' files none."""
    paths = ("", "1_Pooling/", "2_Dense", "head", "../A", "2_Dense/deep", "gone")
    listed = json.dumps([{"path": each} for each in paths])
    modules = {"modules.json": listed, "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}",
               "2_Dense/model-00001-of-00002.safetensors": "weights", "2_Dense/model.safetensors.index.json": "{}",
               "head/pytorch_model.bin": "weights"}  # fmt: skip
    others = {"onnx/config.json": "{}", "2_Dense/rust_model.ot": "x", "2_Dense/pytorch_model.bin": "x",
              "2_Dense/.x": "x", "2_Dense/deep/config.json": "{}", "2024_letters/a.txt": "x"}  # fmt: skip
    models = [make_model(tmp_path / "A", random_tensors(1), files={**modules, **others}),
              make_model(tmp_path / "B", random_tensors(1))]  # fmt: skip
    said = merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert set(report_of(tmp_path / "C")["copied_files"]) == {*modules, "config.json"}
    for name, content in modules.items():
        assert (tmp_path / "C" / name).read_text() == content
    assert f"Copied from {models[0]}, not merged: the weights in" in said.err
    assert "2_Dense/model-00001-of-00002.safetensors" in said.err and "head/pytorch_model.bin" in said.err


def test_large_weights_of_a_module_are_asked_for(
    merge: Run, refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelfuse.checkpoints.side_files.LARGEST", 1000)
    name, files = "2_Dense/model.safetensors", {"modules.json": '[{"path": "2_Dense"}]'}
    files |= {name: "x" * 1001, "2_Dense/pytorch_model.bin": "x" * 2000}
    models = [make_model(tmp_path / each, random_tensors(1), files=files) for each in "AB"]
    words = ["--model_path_list", *models, "--output_path", tmp_path / "C"]
    refuse("merge", *words, says=[models[0] / name, "too large"], hint=f"--copy_file_list {name}")
    merge(*words, "--copy_file_list", name)
    assert (tmp_path / "C" / name).read_text() == "x" * 1001


@pytest.mark.parametrize("listed", ["", "{}", "[1]", '[{"name": 1}]', '[{"path": "./1_x/.."}]', "[" * 99999, "5"])
def test_modules_that_cannot_be_understood_have_no_folders(merge: Run, tmp_path: Path, listed: str) -> None:
    files = {"modules.json": listed, "1_x/config.json": "{}", "1_y/config.json": "{}"}
    models = [make_model(tmp_path / name, random_tensors(1), files=files) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert set(report_of(tmp_path / "C")["copied_files"]) == {"config.json", "modules.json"}


def test_folders_are_no_modules_where_none_are_listed(merge: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, random_tensors(1), files={"1_old/model.safetensors": "x"}) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert report_of(tmp_path / "C")["copied_files"] == ["config.json"]


def test_more_files_by_name(merge: Run, tmp_path: Path) -> None:
    files = {"README.md": "read", "deep/inside/x.txt": "x", ".hidden": "h", "value_head.bin": "v"}
    models = [make_model(tmp_path / name, random_tensors(1), files=files) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C", "--copy_file_list", *files, "./config.json")
    for name, content in files.items():
        assert (tmp_path / "C" / name).read_text() == content
    assert report_of(tmp_path / "C")["copied_files"].count("config.json") == 1


def test_no_config_is_said_and_no_hindrance(merge: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, random_tensors(1), config=None) for name in "AB"]
    said = merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert "no config.json" in said.err
    assert "vllm" not in said.out


def test_master_weights(merge: Run, tmp_path: Path) -> None:
    """Beside bfloat16 weights, the float32 copies of mixed-precision training."""
    models = []
    for seed, name in enumerate("AB"):
        folder = make_model(tmp_path / name, random_tensors(seed, dtype="bfloat16"))
        models.append(make_model(folder, random_tensors(seed), prefix="master_weights", shards=2 - seed))
    merge("--model_path_list", *models, "--output_path", tmp_path / "C", "--merge_prefix", "master_weights")
    merged = read_model(tmp_path / "C", "master_weights")
    expected = (random_tensors(0)["lm_head.weight"] + random_tensors(1)["lm_head.weight"]) / 2
    np.testing.assert_allclose(array(merged["lm_head.weight"]), expected, rtol=1e-6)
    assert not (tmp_path / "C" / WEIGHTS).exists()
    merge(
        "--model_path_list",
        *models,
        "--output_path",
        tmp_path / "D",
        "--model-prefix",
        "master_weights",
        "--max_shard_size",
        250,
    )
    assert read_model(tmp_path / "D", "master_weights") == merged
    assert len(list((tmp_path / "D").glob("master_weights-0000?-of-0000?.safetensors"))) > 1


def test_unicode_and_spaces(merge: Run, tmp_path: Path) -> None:
    names = {
        "schicht.ä.gewicht": np.ones(2, np.float32),
        "层.权重 \U0001f600": np.ones(1, np.float32),
        'a"\\ %': np.ones(1, np.float32),
    }
    models = [make_model(tmp_path / name, names) for name in ("Modell ä", "模型 [b] %s {x}")]
    out = tmp_path / "ein Ort" / "[bold]C ü"
    said = merge("--model_path_list", *models, "--output_path", out)
    assert set(read_model(out)) == set(names)
    assert f"into {out}" in said.out
    assert f"vllm serve '{out}'" in said.out
    check_report(out, models)


def test_paths_that_are_no_unicode(merge: Run, tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"m\xff")
    try:
        models = [make_model(strange, random_tensors(1)), make_model(tmp_path / "B", random_tensors(2))]
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merge(tmp_path / "C" / "merge_config.json", "--output_path", tmp_path / "D")
    assert (tmp_path / "C" / WEIGHTS).read_bytes() == (tmp_path / "D" / WEIGHTS).read_bytes()


# merge_config.json


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "alone"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--merge_method", "linear", "--weight_list", "0.1", "-3e-5"],
        ["--merge_method", "linear", "--weight_list", "1", "2", "--normalize"],
        ["--merge_method", "slerp", "--slerp_alpha", "0.3"],
        ["--merge_method", "ties", "--reserve_p", "0.123456789", "--no_rescale"],
        ["--merge_method", "ties", "--weight_list", "0.3", "0.4", "--normalize", "--ties_elect_type", "count"],
        ["--merge_method", "della", "--seed", "7", "--epsilon", "0.2"],
        ["--merge_type", "slerp", "--sparsify_type", "trim"],
        [
            "--merge_method",
            "dare_linear",
            "--seed",
            str(2**63 - 1),
            "--output_dtype",
            "bf16",
            "--max_shard_size",
            "250",
        ],
    ],
    ids=" ".join,
)
def test_merge_config_gives_the_same_bytes(
    merge: Run, tmp_path: Path, flags: list[str], with_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--base_model_path", make_model(tmp_path / "base", random_tensors(3))] if with_base else []
    monkeypatch.chdir(tmp_path)
    merge("--model_path_list", "A", "B", *base, *flags, "--output_path", "C")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge(tmp_path / "C" / "merge_config.json", "--output_path", tmp_path / "D")
    first, second = snapshot(tmp_path / "C"), snapshot(tmp_path / "D")
    configs = [json.loads(each.pop("merge_config.json")) for each in (first, second)]  # type: ignore[arg-type]
    reports = [json.loads(each.pop("merge_report.json")) for each in (first, second)]  # type: ignore[arg-type]
    assert first == second
    for report in reports:  # They attest to merge_config.json too, which names another output.
        del report["sha256"]["merge_config.json"], report["report_sha256"]
    assert reports[0] == reports[1]
    configs[1]["output_path"] = configs[0]["output_path"]
    assert configs[0] == configs[1]
    before = snapshot(tmp_path / "C")
    merge(tmp_path / "C" / "merge_config.json", "--output_path", tmp_path / "C", "--overwrite")
    after = snapshot(tmp_path / "C")
    assert {name for name in before if before[name] != after[name]} == {"merge_config.json", "merge_report.json"}


def test_merge_config_brings_no_output_along(merge: Run, refuse: Run, pair: Pair, tmp_path: Path) -> None:
    """Handed back as a recipe, it must not replace what it was found beside."""
    words = ["--model_path_list", *pair, "--output_path", tmp_path / "C"]
    merge(*words)
    merge(*words, "--overwrite")
    assert json.loads((tmp_path / "C" / "merge_config.json").read_text())["overwrite"] is True
    refuse("merge", tmp_path / "C" / "merge_config.json", says=["output_path is not given"])
    refuse("merge", tmp_path / "C" / "merge_config.json", "--output_path", tmp_path / "C", hint="--overwrite")


def test_merge_config_holds_every_effective_setting(merge: Run, pair: Pair, tmp_path: Path) -> None:
    merge("--model_path_list", *pair, "--merge_method", "ties", "--output_path", tmp_path / "C")
    config = json.loads((tmp_path / "C" / "merge_config.json").read_text())
    assert config.pop("modelfuse_version") == package.__version__
    others = {
        name: each.default for name, each in PARAMETERS.items()
    }  # Of methods that have no line of their own here.
    assert config == others | {
        "model_path_list": [str(path) for path in pair], "base_model_path": None, "output_path": str(tmp_path / "C"),
        "merge_method": "ties", "merge_type": "ties", "sparsify_type": "trim", "weight_list": [1.0, 1.0],
        "normalize": True, "slerp_alpha": 0.5, "slerp_normalize_eps": 1e-8, "slerp_dot_threshold": 0.9995,
        "ties_elect_type": "sum", "rescale": True, "reserve_p": 0.7, "epsilon": 0.14, "gamma": 0.01, "lambda": 1.0,
        "seed": 0, "device": "cpu",
        "tensor_type": "np", "gpu_memory": 256 * 10**6, "allow_cpu_fallback": False, "n_process": None,
        "memory": 10**9, "merge_prefix": "model", "max_shard_size": 5 * 10**9,
        "output_dtype": None, "overwrite": False, "on_nonfinite": "error", "unmerged_from": None,
        "missing": [], "gram_list": [], "allow_mismatch": False, "tokenizer_from": None,
        "engine": "local", "ray_address": None, "ray_timeout": 30.0,
        "hub_endpoint": None, "hub_anonymous": False, "input_layout": None,
        "output_format": None, "convert_from_hf": None, "save_to_hf": None,
        "lora_rank": None, "lora_include": None, "lora_exclude": None, "lora_epsilon": 0.0, "lora_whole": [],
        "safe_serialization": True, "lora_embeddings": "factors", "lora_distribute_scale": True,
        "lora_skip_whole": False,
        "merge_with_qdq_base_model": False,
        "copy_file_list": [], "split_pieces": 8, "max_tensor_mem": 0.5, "mergekit": None,
        "mergekit_document": None, "tokenizer": None, "intermediate_dir": None, "model_card": True,
        "copy_tokenizer": True, "truncate_embeddings": False,
    }  # fmt: skip


def test_report_of_a_merge(merge: Run, pair: Pair, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", random_tensors(3))
    merge("--model_path_list", *pair, "--base_model_path", base, "--merge_method", "dare_ties", "--weight_list", 3, 1,
          "--normalize", "--seed", 9, "--output_path", tmp_path / "C")  # fmt: skip
    report = check_report(tmp_path / "C", [*pair, base])
    assert report["method"] == {
        "merge_type": "ties",
        "sparsify_type": "dare",
        "effective_weights": [0.75, 0.25],
        "seed": 9,
    }
    assert [entry["role"] for entry in report["inputs"]] == ["model", "model", "base"]
    assert {entry["action"] for entry in report["tensors"].values()} == {"merged"}


# Tied weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"model_type": "llama", "tie_word_embeddings": True}


def tied_model(folder: Path, seed: int, *, head: bool, config: dict[str, object] = TIED) -> Path:
    tensors = random_tensors(seed)
    tensors.pop(HEAD)
    return make_model(folder, {**tensors, HEAD: tensors[EMBED]} if head else tensors, config=config)


@pytest.mark.parametrize("heads", [(True, True, True), (True, False, True), (False, True, False), (False, False, True)])
def test_tied_heads_are_left_out(merge: Run, tmp_path: Path, heads: tuple[bool, ...]) -> None:
    models = [
        tied_model(tmp_path / name, seed, head=head) for seed, (name, head) in enumerate(zip("ABC", heads, strict=True))
    ]
    said = merge(
        "--model_path_list",
        *models[:2],
        "--base_model_path",
        models[2],
        "--output_path",
        tmp_path / "M",
        "--merge_method",
        "dare_linear",
    )
    assert "5 tensors" not in said.out
    assert HEAD not in read_model(tmp_path / "M")
    report = check_report(tmp_path / "M", models)
    assert report["left_out"] == [{"tensor": HEAD, "because": f"tied to {EMBED}"}]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": None, "llm_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": "yes"}}, False),
        ({"text_config": [True]}, False),
    ],
)
def test_what_multimodal_models_say_of_ties(merge: Run, tmp_path: Path, config: dict[str, object], tied: bool) -> None:
    models = [tied_model(tmp_path / name, seed, head=True, config=config) for seed, name in enumerate("AB")]
    merge("--model_path_list", *models, "--output_path", tmp_path / "M")
    assert (HEAD not in read_model(tmp_path / "M")) == tied


def test_heads_that_are_not_tied_are_merged(merge: Run, pair: Pair, tmp_path: Path) -> None:
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C")
    assert HEAD in read_model(tmp_path / "C")
    assert report_of(tmp_path / "C")["left_out"] == []


def test_a_tied_and_an_untied_model_are_merged_into_an_untied_one(merge: Run, pair: Pair, tmp_path: Path) -> None:
    """The tied one's head is its embedding."""
    tied = tied_model(tmp_path / "T", 5, head=False)
    for number, models in enumerate(((pair[0], tied), (tied, pair[0]))):
        merge("--model_path_list", *models, "--output_path", tmp_path / f"C{number}")
        assert HEAD in read_model(tmp_path / f"C{number}")
