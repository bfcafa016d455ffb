"""The command line: flags, recipe files, what it prints, how it starts."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Set
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, Said, array, call, make_model, random_tensors, read_model, start
from definitions import MERGE_METHODS, MERGES, SPARSIFIERS

import modelfuse as package
from modelfuse.cli import help_pages
from modelfuse.cli.arguments import Options, parse
from modelfuse.cli.commands import COMMANDS
from modelfuse.cli.help import default_of
from modelfuse.cli.setting_groups import groups
from modelfuse.methods.registry import PARAMETERS
from modelfuse.planning import memory_budget
from modelfuse.recipe.method_settings import METHOD_SETTINGS
from modelfuse.recipe.names import SETTINGS
from modelfuse.recipe.recipe import Recipe

Run = Callable[..., Said]
Pair = tuple[Path, Path]


def merged(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "merge_config.json").read_text())
    return settings


# The command of Paddle's tool


def test_mergekit_from_its_folder_with_relative_paths(pair: Pair, tmp_path: Path) -> None:
    here = [os.path.relpath(path, ROOT / "tools") for path in (*pair, tmp_path / "C")]
    words = ["--device", "cpu", "--tensor_type", "np", "--n_process", "2", "--merge_method", "linear",
             "--model_path_list", here[0], here[1], "--output_path", here[2]]  # fmt: skip
    command = [sys.executable, "-W", "error", "mergekit.py", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT / "tools", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "C") in done.stdout
    first, second = random_tensors(1), random_tensors(2)
    for name, stored in read_model(tmp_path / "C").items():
        np.testing.assert_allclose(array(stored), (first[name] + second[name]) / 2, rtol=1e-6)
    assert settings_of(tmp_path / "C")["n_process"] == 2


@pytest.mark.usefixtures("pair")
def test_modelfuse_merge_is_the_same(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merge(
        "--device",
        "cpu",
        "--tensor_type",
        "np",
        "--n_process",
        2,
        "--merge_method",
        "ties",
        "--model_path_list",
        "A",
        "./B",
        "--output_path",
        "out/../C",
        "--model_prefix",
        "model",
        "--split_pieces",
        4,
        "--max_tensor_mem",
        0.25,
        "--reserve_p",
        0.5,
        "--ties_elect_type",
        "count",
        "--copy_file_list",
        "config.json",
    )
    package.merge(
        model_path_list=["A", "B"], output_path="D", merge_method="ties", reserve_p=0.5, ties_elect_type="count"
    )
    assert merged(tmp_path / "C") == merged(tmp_path / "D")


# Settings

DEFAULTS = {
    "device": "cpu",
    "tensor_type": "np",
    "gpu_memory": 256 * 10**6,
    "allow_cpu_fallback": False,
    "n_process": None,
    "merge_prefix": "model",
    "merge_method": None,
    "merge_type": None,
    "sparsify_type": None,
    "base_model_path": None,
    "output_path": None,
    "weight_list": None,
    "normalize": None,
    "slerp_alpha": 0.5,
    "slerp_normalize_eps": 1e-8,
    "slerp_dot_threshold": 0.9995,
    "ties_elect_type": "sum",
    "rescale": True,
    "reserve_p": 0.7,
    "epsilon": 0.14,
    "copy_file_list": (),
    "mergekit": None,
    "tokenizer": None,
    "mergekit_document": None,
    "intermediate_dir": None,
    "copy_tokenizer": True,
    "truncate_embeddings": False,
    "model_card": True,
    "split_pieces": 8,
    "max_tensor_mem": 0.5,
    "seed": 0,
    "memory": 10**9,
    "max_shard_size": 5 * 10**9,
    "output_dtype": None,
    "input_layout": None,
    "output_format": None,
    "convert_from_hf": None,
    "save_to_hf": None,
    "lora_rank": None,
    "safe_serialization": True,
    "lora_include": None,
    "lora_exclude": None,
    "lora_epsilon": 0.0,
    "lora_embeddings": "factors",
    "lora_whole": (),
    "lora_distribute_scale": True,
    "lora_skip_whole": False,
    "merge_with_qdq_base_model": False,
    "rules": (),
    "lambda": 1.0,
    "gamma": 0.01,
    "rank_tolerance": 1e-6,
    "common_fraction": 0.8,
    "ridge_mu": 0.3,
    "swudi_share": 0.85,
    "swudi_time": 1.5,
    "gram_list": (),
    "overwrite": False,
    "on_nonfinite": "error",
    "unmerged_from": None,
    "missing": (),
    "allow_mismatch": False,
    "tokenizer_from": None,
    "hub_endpoint": None,
    "hub_anonymous": False,
    "engine": "local",
    "ray_address": None,
    "ray_timeout": 30.0,
}


def test_defaults() -> None:
    recipe = Recipe.parse({"model_path_list": ["A", "B"]})
    general = {name: value for name, value in vars(recipe).items() if name != "parameters"}
    settings = {**general, **{name: recipe.parameters[name] for name in METHOD_SETTINGS}}
    declared = {name: each.default for name, each in PARAMETERS.items()}
    assert settings == {**declared, **DEFAULTS, "model_path_list": recipe.model_path_list}
    assert recipe.model_path_list == (Path("A").absolute(), Path("B").absolute())
    methods = recipe.parameters
    assert (methods.steps, recipe.weights, methods.normalizes) == ((None, "linear"), (0.5, 0.5), True)
    assert not Recipe.parse({"model_path_list": ["A", "B"], "weight_list": [1, 2]}).parameters.normalizes


@pytest.mark.parametrize("name", sorted({*DEFAULTS, "model_path_list"}))
def test_every_setting_is_a_flag_with_either_dash(name: str) -> None:
    several = {"model_path_list": ["A", "B"], "weight_list": ["1", "2"], "copy_file_list": ["a", "b"]}
    several |= {"input_layout": ["hf", "paddle"], "rules": ["a", "b"], "missing": ["a", "b"], "lora_whole": ["a", "b"],
                "gram_list": ["a", "b"]}  # fmt: skip
    value = several.get(name, ["False"])
    for flag in (f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('_', '-', 1)}"):
        settings, options = parse([flag, *value])
        assert settings == {name: value if len(value) > 1 else value[0]}
        assert options == Options()
        if len(value) == 1:
            assert parse([f"{flag}=False"])[0] == {name: "False"}
    assert SETTINGS[name].description


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--rescale"], True),
        (["--rescale", "True"], True),
        (["--rescale", "true"], True),
        (["--rescale", "1"], True),
        (["--rescale", "Yes"], True),
        (["--rescale", "t"], True),
        (["--rescale", "on"], True),
        (["--rescale", "N"], False),
        (["--rescale", "off"], False),
        (["--rescale", "False"], False),
        (["--rescale", "false"], False),
        (["--rescale", "0"], False),
        (["--rescale=False"], False),
        (["--no_rescale"], False),
        (["--no-rescale"], False),
        (["--rescale", "False", "--rescale"], True),
        (["--no_rescale", "--rescale", "--n_process", "2"], True),
        ([], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_booleans(words: list[str], value: bool) -> None:
    settings, _ = parse([*words, "--model_path_list", "A", "B"])
    assert Recipe.parse(settings).parameters["rescale"] is value


def test_numbers_of_numpy_and_words_for_numbers() -> None:
    weights = np.array([0.25, 0.75], np.float32)
    settings = {"model_path_list": ["A", "B"], "weight_list": weights, "epsilon": np.float64(0.2), "seed": np.int64(3),
                "n_process": "2", "max_tensor_mem": "1e0", "memory": "1.5GB", "rescale": np.bool_(False)}  # fmt: skip
    recipe = Recipe.parse(settings)
    given = recipe.parameters
    assert (given["weight_list"], given["epsilon"], recipe.seed, recipe.n_process) == ((0.25, 0.75), 0.2, 3, 2)
    assert (recipe.max_tensor_mem, recipe.memory, given["rescale"]) == (1.0, 1_500_000_000, False)
    values = [*recipe.effective().values()]
    assert json.loads(json.dumps(values)) == values


class Evil:
    """An object that answers nothing."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)

    def __repr__(self) -> str:
        raise KeyError


STRANGE: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 10**5000, 0.5, float("nan"), float("inf"), "", "x", "1", "nan", "9" * 1_000_001, "-0",
    b"x", [], [1], ["a"], [[1]], {}, {"a": 1}, {1, 2}, np.float32(0.5), np.int64(3), np.array([0.5, 0.5]), np.array(3),
    np.int64, np.ndarray, Fraction(1, 2), Decimal("1e99999"), Evil(), [Evil()], object(), range(2), deque("ab"),
    [np.float64(0.3), np.float64(0.7)], "\ud800", "a\0b", Path("x"), print, "s3://", "http://x",
)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_is_given_is_understood_or_refused(name: str) -> None:
    """And what is understood is kept in a form that means the same."""
    for value in STRANGE:
        for make in (Recipe.parse, lambda settings: Recipe(**settings)):
            try:
                recipe = make({"model_path_list": ["A", "B"], name: value})
            except package.RecipeError as error:
                assert str(error)
                continue
            kept = json.loads(json.dumps(recipe.effective(), allow_nan=False))
            assert Recipe.parse(kept).effective() == kept


def test_lists_of_any_kind() -> None:
    names = ("A", "B")
    for several in (list(names), deque(names), map(Path, names), (each for each in names), dict.fromkeys(names).keys()):
        if isinstance(several, Set):  # In no order that anybody has chosen.
            with pytest.raises(package.RecipeError, match="give a list"):
                Recipe.parse({"model_path_list": several})
        else:
            recipe = Recipe.parse({"model_path_list": several})
            assert recipe.model_path_list == (Path("A").absolute(), Path("B").absolute())
    recipe = Recipe.parse({"model_path_list": names, "weight_list": [*np.linspace(0.25, 0.75, 2)]})
    assert recipe.parameters["weight_list"] == (0.25, 0.75)
    assert recipe.changed(seed=3) == Recipe.parse({"model_path_list": names, "weight_list": [0.25, 0.75], "seed": 3})
    assert hash(recipe) == hash(recipe.changed())


@pytest.mark.parametrize(
    ("given", "weights", "normalizes"),
    [([], (0.5, 0.5), True), (["--weight_list", "1", "3"], (1, 3), False),
     (["--weight_list", "1", "3", "--normalize"], (0.25, 0.75), True),
     (["--weight_list", "-1", "3", "--normalize"], (-0.5, 1.5), True),
     (["--weight_list", "-1e-2", "+.5"], (-0.01, 0.5), False),
     (["--weight_list", "1", "1", "--no_normalize"], (1, 1), False),
     (["--weight_list", "-1", "1"], (-1, 1), False)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_weights(given: list[str], weights: tuple[float, ...], normalizes: bool) -> None:
    recipe = Recipe.parse(parse(["--model_path_list", "A", "B", *given])[0])
    assert (recipe.weights, recipe.parameters.normalizes) == (weights, normalizes)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("500MB", 5 * 10**8),
        ("5 GB", 5 * 10**9),
        ("1.5gib", 3 * 2**29),
        ("2TB", 2 * 10**12),
        ("7b", 7),
        ("1KiB", 1024),
        (" 3 kb ", 3000),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert Recipe.parse({"model_path_list": ["A", "B"], "memory": text}).memory == count


def test_model_path_str(merge: Run, pair: Pair, tmp_path: Path) -> None:
    merge("--model_path_str", f"{pair[0]}, {pair[1]},", "--output_path", tmp_path / "C")
    assert settings_of(tmp_path / "C")["model_path_list"] == [str(path) for path in pair]


@pytest.mark.parametrize("name", ["recipe.json", "recipe.yaml", "recipe.yml", "recipe"])
def test_a_recipe_with_flags_that_override_it(merge: Run, pair: Pair, tmp_path: Path, name: str) -> None:
    settings = {
        "model-path-list": [str(path) for path in pair], "output_path": str(tmp_path / "C"), "merge_method": "linear",
        "weight_list": [1, 2.5], "memory": "800MB", "rescale": False, "model_prefix": "model", "base_model_path": None,
    }  # fmt: skip
    text = json.dumps(settings) if name.endswith("json") else yaml.safe_dump(settings, allow_unicode=True)
    (tmp_path / name).write_text(text)
    merge(tmp_path / name)
    assert settings_of(tmp_path / "C")["weight_list"] == [1, 2.5]
    assert settings_of(tmp_path / "C")["memory"] == 800_000_000
    merge("--weight-list", 3, 4, "--output-path", tmp_path / "D", "--rescale", "--overwrite", tmp_path / name)
    effective = settings_of(tmp_path / "D")
    assert (effective["weight_list"], effective["rescale"], effective["memory"]) == ([3, 4], True, 800_000_000)
    assert parse(["--no_rescale", str(tmp_path / name)])[0]["rescale"] == "False"
    assert parse(["--model_path_list", "overwrite", "B.json"])[0]["model_path_list"] == ["overwrite", "B.json"]


def test_models_of_a_recipe_are_overridden_in_either_form(tmp_path: Path) -> None:
    for key, value in (("model_path_list", ["x", "y"]), ("model_path_str", "x,y")):
        (tmp_path / "r.json").write_text(json.dumps({key: value}))
        for flags in (["--model_path_str", "a,b"], ["--model_path_list", "a", "b"]):
            settings, _ = parse([str(tmp_path / "r.json"), *flags])
            assert Recipe.parse(settings).model_path_list == (Path("a").absolute(), Path("b").absolute())


def test_the_same_names_in_python(merge: Run, pair: Pair, tmp_path: Path) -> None:
    result = package.merge(
        model_path_str=f"{pair[0]},{pair[1]}", output_path=str(tmp_path / "C"), weight_list=(0.2, 0.8)
    )
    assert (result.output_path, result.merged, result.copied) == (tmp_path / "C", 5, 0)
    assert result.bytes_written == (tmp_path / "C" / "model.safetensors").stat().st_size
    assert result.bytes_read == 2 * sum(len(each.data) for each in read_model(pair[0]).values())
    merge("--model_path_list", *pair, "--weight_list", "0.2", "0.8", "--output_path", tmp_path / "D")
    assert merged(tmp_path / "C") == merged(tmp_path / "D")


def test_progress_in_python(pair: Pair, tmp_path: Path) -> None:
    seen: list[int] = []
    result = package.merge(model_path_list=pair, output_path=tmp_path / "C", progress=seen.append, n_process=3)
    data = sum(len(each.data) for each in read_model(tmp_path / "C").values())
    assert sum(seen) == result.bytes_read + data


# What people see


def test_a_log_is_quiet(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    words = ["merge", "--model_path_list", *pair, "--output_path", tmp_path / "C", "--overwrite"]
    first, said = call(*words), call(*words)
    assert (first.status, said.status) == (0, 0), said.err
    what = "merging 5 tensors of 2 checkpoints, 2.02 kB"
    assert first.err.splitlines() == [what]  # Nothing is compiled for a small merge.
    assert said.err.splitlines() == [what]
    summary, *following = said.out.splitlines()
    assert summary.startswith("merged 5 tensors in ")
    assert summary.endswith(f"B/s) into {tmp_path / 'C'}")
    assert " 0.0 GB" not in summary
    assert following == ["next:", f"  vllm serve {tmp_path / 'C'}", f"  modelfuse verify {tmp_path / 'C'}"]
    assert "\x1b" not in said.out + said.err


def test_a_long_merge_says_where_it_is(monkeypatch: pytest.MonkeyPatch, merge: Run, pair: Pair, tmp_path: Path) -> None:
    monkeypatch.setattr("modelfuse.cli.progress.LOG_INTERVAL", 0.0)
    said = merge("--model_path_list", *pair, "--output_path", tmp_path / "C")
    lines = said.err.splitlines()[1:]
    assert len(lines) == 5
    assert "/s" not in lines[0]  # Nothing is known of the speed.
    assert all("/s" in line and line.endswith("s left") for line in lines[1:])


def test_the_summary_counts_copies(merge: Run, tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / name, {"w": np.ones(2, np.float32), "a": np.arange(3), "b": np.arange(3)})
        for name in "AB"
    ]
    said = merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert said.out.startswith("merged 1 tensor, copied 2 in ")


def test_quiet(merge: Run, pair: Pair, tmp_path: Path) -> None:
    said = merge("--model_path_list", *pair, "--output_path", tmp_path / "C", "--quiet")
    assert (said.out, said.err) == ("", "")


def on_a_terminal(*words: object, columns: int = 120) -> tuple[int, str]:
    """The exit status, and everything shown."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "modelfuse", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(columns)}
    shown = b""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        try:
            while part := os.read(leader, 65536):
                shown += part
        except OSError:
            pass  # How Linux says that the other end is closed.
    os.close(leader)
    return process.returncode, shown.decode()


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / name, {str(each): np.ones(300_000, np.float32) for each in range(40)}) for name in "AB"
    ]
    status, text = on_a_terminal("merge", "--model_path_list", *models, "--output_path", tmp_path / "C")
    assert status == 0, text
    assert "merging" in text
    assert "━" in text
    assert "MB" in text
    assert "/s" in text
    assert "\x1b[" in text
    assert "40 tensors" in text


CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_terminal_shows_notes_before_the_bar(pair: Pair, tmp_path: Path) -> None:
    words = ("--model_path_list", *pair, "--output_path", tmp_path / "C", "--memory", "1MB", "--n_process", 4)
    status, text = on_a_terminal("merge", *words)
    assert status == 0, text
    assert "note:" in text
    assert text.index("1 of 4 workers") < text.index("merging")
    assert "note:" not in on_a_terminal("merge", *words, "--overwrite", "--quiet")[1]


def test_eighty_columns(pair: Pair, tmp_path: Path) -> None:
    """No word is torn, no line is too long but for a path or a command, which a terminal wraps by itself."""
    words: list[object] = ["--model_path_list", *pair, "--output_path", tmp_path / "C", "--memory", "1MB"]
    own: dict[str, list[object]] = {"verify": [tmp_path / "C"], "methods": [], "help": ["merge"]}
    for command in ("check", "merge", "verify", "methods", "help"):
        given = own.get(command, words)
        status, text = on_a_terminal(command, *given, columns=80)
        plain = call(command, *given, *(["--overwrite"] if command == "merge" else []))
        assert (status, plain.status) == (0, 0), text
        lines = CONTROLS.sub("", text).replace("\r", "\n").splitlines()
        for line in lines:
            assert len(line) <= 80 or " " not in line.strip() or line.startswith("  vllm") or "modelfuse ver" in line
            assert line == line.rstrip() or "━" in line or not line.strip()
        if command in ("methods", "help"):
            assert CONTROLS.sub("", text).split() == plain.out.split()
        assert all(str(path) in text for path in (pair if command == "check" else ()))


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (["1,2"], ["1", "2"]),
        (["[1,", "2]"], ["1", "2"]),
        (["[1,2]"], ["1", "2"]),
        (["-1,.5"], ["-1", ".5"]),
        (["[-1,", "2.5]"], ["-1", "2.5"]),
        (["1", "2,"], ["1", "2"]),
    ],
)
def test_lists_with_commas_and_brackets(words: list[str], weights: list[str]) -> None:
    assert parse(["--weight_list", *words])[0]["weight_list"] == weights


def test_lists_of_paths_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--model_path_list", "A,B"])[0] == {"model_path_list": ["A", "B"]}
    assert parse(["--model_path_list", "[A,", "B]"])[0] == {"model_path_list": ["A", "B"]}
    assert parse(["--model_path_list", "s3://b/a,b"])[0] == {"model_path_list": ["s3://b/a,b"]}
    (tmp_path / "A,B").mkdir()
    (tmp_path / "[x]").mkdir()
    assert parse(["--model_path_list", "A,B", "C"])[0] == {"model_path_list": ["A,B", "C"]}
    assert parse(["--model_path_list", "[x]", "[x]"])[0] == {"model_path_list": ["[x]", "[x]"]}


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--keep", "reserve_p"),
        ("--dry-run", "`modelfuse check`"),
        ("--weights", "weight_list"),
        ("--verbos", "'verbose'"),
        ("--merge-metod", "'merge_method'"),
        ("--frobnicate", "--help"),
    ],
)
def test_suggestions_are_near_or_none(modelfuse: Run, flag: str, hint: str) -> None:
    said = modelfuse("merge", flag)
    assert said.status == 2
    assert hint in said.err.partition("hint: ")[2]
    assert ("Did you mean" in said.err) == hint.startswith("'")


def test_workers_are_one_a_processor(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfuse.planning.memory_budget.processors", lambda: 3)
    assert package.check(model_path_list=pair).workers == 3
    assert package.check(model_path_list=pair, n_process=2).workers == 2
    package.merge(model_path_list=pair, output_path=tmp_path / "C")
    package.merge(model_path_list=pair, output_path=tmp_path / "D", n_process=1)
    assert merged(tmp_path / "C") == merged(tmp_path / "D")
    assert settings_of(tmp_path / "C")["n_process"] is None


@pytest.mark.parametrize(("share", "count"), [("150000 100000", 2), ("max 100000", 4), ("x", 4), ("900000 100000", 4)])
def test_processors_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, count: int) -> None:
    (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(memory_budget, "CONTAINER_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert memory_budget.processors() == count
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert memory_budget.processors() == count


def test_the_launcher_of_paddle_keeps_one_worker(pair: Pair, tmp_path: Path) -> None:
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"n_process": 2}))
    for number, words in ((1, []), (2, [recipe]), (3, [recipe, "--n_process", "3"])):
        command = [sys.executable, ROOT / "tools" / "mergekit.py", *words, "--model_path_list", *pair]
        subprocess.run([*map(str, command), "--output_path", str(tmp_path / str(number))], check=True)
        assert settings_of(tmp_path / str(number))["n_process"] == number


def test_every_command_has_its_help(modelfuse: Run) -> None:
    assert {*help_pages.PAGES} == {*COMMANDS, "help"}
    for command, page in help_pages.PAGES.items():
        said = modelfuse("help", command)
        assert said.status == 0
        assert page.summary in said.out
        assert "\\n" not in said.out
        assert command == "help" or modelfuse(command, "--help").out == said.out
    assert modelfuse("help").out == modelfuse("--help").out
    refused = modelfuse("help", "xyzzy")
    assert refused.status == 2
    assert "The commands are merge, check, verify" in refused.err


def test_help_has_choices_and_defaults() -> None:
    grouped = [name for names in groups().values() for name in names]
    assert sorted(grouped) == sorted(SETTINGS)
    for setting in SETTINGS.values():
        assert setting.is_required or default_of(setting) not in ("None", "()", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(modelfuse: Run, shell: str) -> None:
    said = modelfuse("completion", shell)
    assert said.status == 0
    assert all(word in said.out for word in ("merge_method", "dare_ties", "verify", "sample", "log_file"))
    assert modelfuse("completion", "fish").status == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_methods(modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(modelfuse("completion", "bash").out)
    code = (
        f"source {tmp_path / 'script'}; COMP_WORDS=(modelfuse merge --merge_method da); COMP_CWORD=3;"
        "_shtab_modelfuse; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["dare_linear", "dare_ties"], done.stderr


def test_logs_have_times_and_levels(modelfuse: Run, pair: Pair, tmp_path: Path) -> None:
    words = ("--model_path_list", *pair, "--output_path", tmp_path / "C", "--memory", "1MB", "--n_process", 4)
    said = modelfuse("merge", *words, "-v", "--log_file", tmp_path / "log")
    assert said.status == 0, said.err
    stamped = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d{4} (DEBUG|INFO|WARNING|ERROR) +\S")
    shown, kept = said.err.splitlines(), (tmp_path / "log").read_text().splitlines()
    assert all(stamped.match(line) for line in shown + kept)
    assert [line[24:] for line in kept if " DEBUG " in line and " memory = " in line] == [" DEBUG   memory = 1000000"]
    assert any(" WARNING " in line and "1 of 4 workers" in line for line in shown)
    assert [line for line in kept if "merged 5 tensors" in line]
    assert said.out.startswith("merged 5 tensors")
    modelfuse("merge", *words, "--log_file", tmp_path / "log")
    assert any(" ERROR " in line and "exists" in line for line in (tmp_path / "log").read_text().splitlines())
    refused = modelfuse("merge", *words, "--log_file", tmp_path / "absent" / "log")
    assert refused.status == 2
    assert "log_file" in refused.err


def test_all_settings_are_in_the_help(modelfuse: Run) -> None:
    for words in (
        ["merge", "--help"],
        ["merge", "-h"],
        ["check", "--help"],
        ["merge", "--model_path_list", "A", "--help"],
    ):
        said = modelfuse(*words)
        assert (said.status, said.err) == (0, "")
        assert all(f"--{name} " in said.out for name in SETTINGS)
        assert "5 GB" in said.out
        assert "0.9995" in said.out


def test_how_to_begin(modelfuse: Run) -> None:
    assert modelfuse("--version").out == f"modelfuse {package.__version__}\n"
    assert modelfuse("-V").out == f"modelfuse {package.__version__}\n"
    for words, status in (([], 2), (["--help"], 0), (["-h"], 0)):
        said = modelfuse(*words)
        assert said.status == status
        assert all(command in said.out for command in ("merge", "check", "methods"))


def test_methods(modelfuse: Run) -> None:
    said = modelfuse("methods")
    assert (said.status, said.err) == (0, "")
    assert all(name in said.out for name in (*MERGE_METHODS, *MERGES, *SPARSIFIERS))
    for word in ("formula", "settings", "paper", "arXiv", "reserve_p", "epsilon", "slerp_alpha", "ties_elect_type"):
        assert word in said.out
    assert "…" not in said.out
    for word in ("--x", "ties"):
        refused = modelfuse("methods", word)
        assert (refused.status, refused.out) == (2, "")
        assert f"methods takes no arguments, but got {word!r}" in refused.err


def test_a_bug_is_not_called_a_mistake(modelfuse: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr("modelfuse.planning.open_inputs.open_checkpoint", broken)
    said = modelfuse("check", "--model_path_list", *pair)
    assert said.status == 1
    assert "injected" in said.err
    assert "bug in modelfuse" in said.err


@pytest.mark.parametrize("command", [["methods"], ["merge", "--help"]])
def test_any_encoding_will_do(command: list[str]) -> None:
    """Formulas have Greek letters; a terminal may not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "modelfuse", *command], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early() -> None:
    with start("methods") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err


# How it starts


def test_importing_loads_next_to_nothing() -> None:
    code = "import sys, modelfuse; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    said = call(code=code)
    assert said.status == 0, said.err
    assert not {"numpy", "msgspec", "numba", "yaml", "rich", "xxhash", "torch"} & set(said.out.split())


def test_no_module_loads_torch(pair: Pair, tmp_path: Path) -> None:
    code = (
        "import sys; from modelfuse.cli.main import main; status = main(sys.argv[1:]);"
        "print(*{'torch', 'paddle', 'transformers', 'safetensors'} & {*sys.modules}); sys.exit(status)"
    )
    said = call("merge", "--model_path_list", *pair, "--output_path", tmp_path / "C", "--quiet", code=code)
    assert (said.status, said.out) == (0, "\n")


#: What only some merges need: pickles, other layouts, adapters, hub names, stores, a base, other libraries, a cluster.
SELDOM_NEEDED = {
    "checkpoints.formats": ("paddle", "torch", "safe_unpickler", "byte_window", "pickle", "numpy", "state_dicts"),
    "checkpoints.views": ("strided", "rearranged"),
    "checkpoints.output": ("remote",),
    "checkpoints.adapters": ("apply", "config", "as_adapter", "quantized_base"),
    "planning.hub": ("download", "client", "resolve"),
    "storage.remote": ("open_store", "range_cache", "stores", "object_stores", "web"),
    "kernels.arrays": ("torch", "paddle"),
    "kernels.compiled": ("base_distance", "truncated_svd", "low_rank", "fp8"),
    "execution.ray": ("",),
}


def test_a_plain_merge_loads_what_it_needs(pair: Pair, tmp_path: Path) -> None:
    code = (
        "import sys; from modelfuse.cli.main import main; status = main(sys.argv[1:]);"
        "print(*sys.modules); sys.exit(status)"
    )  # fmt: skip
    words = ("merge", "--model_path_list", *pair, "--quiet", "--output_path")
    assert call("warm", "linear", "--quiet").status == 0
    assert call(*words, tmp_path / "C").status == 0
    said = call(*words, tmp_path / "D", code=code)
    assert said.status == 0, said.err
    loaded = said.out.split()
    seldom = tuple(f"modelfuse.{package}.{name}" for package, names in SELDOM_NEEDED.items() for name in names)
    needed = {"execution.run", "checkpoints.adapters", "planning.hub", "kernels.compiled.passes"}
    assert {f"modelfuse.{name}" for name in needed} <= set(loaded)
    assert [name for name in loaded if name.startswith(seldom)] == []
    assert not {"numba", "numpy.ma", "numpy.random", "rich", "yaml", "pickletools"} & set(loaded)


def test_the_public_names_are_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        _ = package.mrege
    with pytest.raises(package.RecipeError, match="no setting 'reserve_q'"):
        package.check(model_path_list=["A", "B"], reserve_q=1)  # type: ignore[call-arg]


def test_merging_in_python_needs_an_output_path(pair: Pair) -> None:
    with pytest.raises(package.OutputError, match="output_path is not given"):
        package.merge(model_path_list=pair)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["methods", "--version", "merge --help"])
def test_standard_output_that_is_full(words: str) -> None:
    with open("/dev/full", "w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "modelfuse", *words.split()],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (said.returncode, said.stderr) == (1, "error: standard output: No space left on device\n")


def test_a_reader_that_has_seen_enough_hears_nothing_more() -> None:
    command = f"{sys.executable} -m modelfuse methods | true"
    said = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("closed", ["2> /dev/full", ">&- 2>&-"])
def test_a_log_that_is_full_or_closed_ends_no_merge(pair: tuple[Path, Path], tmp_path: Path, closed: str) -> None:
    words = f"merge --model_path_list {pair[0]} {pair[1]} --output_path {tmp_path / 'C'}"
    said = subprocess.run(f"{sys.executable} -m modelfuse {words} {closed}", shell=True, cwd=ROOT, capture_output=True)
    assert said.returncode == 0
    assert (tmp_path / "C" / "merge_report.json").exists()
