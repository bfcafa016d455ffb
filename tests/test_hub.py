"""Models named as on a hub: what is fetched, what is remembered, and what is said where that cannot be."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import adapter_of, make_base, make_paddle
from conftest import Said, call, make_model, random_tensors, start
from hub_server import Hub, serving

import modelfuse as package
from modelfuse.checkpoints.output import atomic_folder
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.errors import HubError, MissingExtraError, _installed_from
from modelfuse.planning.hub import FetchDisplay, client, fetch, parallel_jobs
from modelfuse.recipe.hub_names import HubName, hub_name
from modelfuse.recipe.recipe import Recipe

constants = pytest.importorskip("huggingface_hub.constants")

Run = Callable[..., Said]
KEPT = "note: Files that were fetched completely are kept; the same command resumes from there."
#: What a hub has beside a model, and no merge needs.
BESIDE = {"README.md": "about", "model.gguf": "other weights", "onnx/model.onnx": "others", "tf_model.h5": "others",
          "training_args.bin": "pickle", ".gitattributes": "git", "original/params.json": "{}"}  # fmt: skip
SERVED = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "generation_config.json": '{"b": 2}',
          "additional_chat_templates/tools.jinja": "{{ tools }}", "modules.json": '[{"path": "1_Pooling"}]',
          "1_Pooling/config.json": '{"c": 3}'}  # fmt: skip


def large(seed: int, rows: int = 200) -> dict[str, np.ndarray]:
    """Tensors of more bytes than are read to see a header."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (rows, 300), "model.layers.0.mlp.up_proj.weight": (400, 300),
              "model.norm.weight": (300,), "lm_head.weight": (rows, 300)}  # fmt: skip
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and an empty cache, for this process and for those that it starts."""
    home = tmp_path_factory.mktemp("huggingface")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def cache(hub: Hub) -> Path:
    return Path(constants.HF_HUB_CACHE)


@pytest.fixture
def published(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """org/a, of several shards, and org/b; both are in ``local`` too."""
    monkeypatch.chdir(tmp_path)
    hub.add("org/a", make_model(tmp_path / "local" / "a", large(1), shards=3, files={**BESIDE, **SERVED}))
    hub.add("org/b", make_model(tmp_path / "local" / "b", large(2), files={**BESIDE, **SERVED}))
    return hub


def words(hub: Hub, *models: object, out: object = "C") -> list[object]:
    return ["--model_path_list", *models, "--output_path", out, "--hub_endpoint", hub.endpoint]


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge_config.json").read_text())
    return content


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def head(hub: Hub, name: str, branch: str = "main") -> str:
    return hub.repositories[name].refs[branch]


# Names


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("org/model", HubName("org/model")),
        ("Org_1/Mod-el.v2@main", HubName("Org_1/Mod-el.v2", "main")),
        ("hf://org/model@v2", HubName("org/model", "v2")),
        ("hf://datasets/org/model", None),
        ("org/model@refs/pr/1", HubName("org/model", "refs/pr/1")),
        ("org/model@" + "0a" * 20, HubName("org/model", "0a" * 20)),
        *[
            (word, None)
            for word in ("model", "a/b/c", "./org/model", "~/model", "/org/model", "../model", ".org/model", "org/",
                         "org/model@", "org/model@-x", "org/model@a b", "org/model@a..b", "o--rg/model", "org/mo..del",
                         "org/model.git", "org/model.safetensors", "örg/model", "org/model-", "org/model.",
                         "org/.model", f"{'o' * 97}/model", "org/model\n", "", "s3://org/model")
        ],
    ],
)  # fmt: skip
def test_what_looks_like_a_hub_name(word: str, expected: HubName | None) -> None:
    assert hub_name(word) == expected


def test_a_hub_that_is_named_as_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Run) -> None:
    """No folder is meant; a whole output is sent by a command of its own."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "org" / "a", random_tensors(1))
    assert Recipe.parse({"model_path_list": ["hf://org/a", "org/a"]}).model_path_list == (
        HubName("org/a"), tmp_path / "org/a",
    )  # fmt: skip
    words = ["--model_path_list", "org/a", "org/a", "--output_path"]
    refuse("merge", *words, "hf://org/c", says=["output_path is 'hf://org/c'", "modelfuse push FOLDER org/model"])
    words = ["--model_path_list", "hf://org/a/file", "org/a", "--output_path", "C"]
    refuse("merge", *words, says=["hf://org/a/file", "hf://organization/model"])


def test_huggingface_hub_takes_what_we_take() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    letters = ["a", "B", "0", "_", "-", ".", "--", "..", ".git", ""]
    for word in (f"{first}{middle}/{last}x" for first in letters for middle in letters for last in letters):
        try:
            validate_repo_id(word)
            allowed = word.count("/") == 1 and not word.startswith("/")
        except HFValidationError:
            allowed = False
        assert (hub_name(word) is not None) == allowed, word


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "org" / "a", random_tensors(1))
    recipe = Recipe.parse({"model_path_list": ["org/a", "org/b", Path("org/c"), "./org/d"], "unmerged_from": "org/b"})
    assert recipe.model_path_list == (
        tmp_path / "org/a", HubName("org/b"), tmp_path / "org/c", tmp_path / "org/d",
    )  # fmt: skip
    assert recipe.hub_names == (HubName("org/b"),)
    assert recipe.unmerged_from == HubName("org/b")
    assert Recipe.parse({"model_path_list": ["a", "b"], "output_path": "org/c"}).output_path == tmp_path / "org" / "c"


# The whole way


def test_merged_from_a_hub_verified_and_merged_again_elsewhere(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = call("merge", "--model_path_list", "org/a", "org/b@main", "--output_path", "C", folder=tmp_path)
    assert said.status == 0, said.err
    assert "fetching " in said.err
    call("merge", "--model_path_list", "local/a", "local/b", "--output_path", "D", folder=tmp_path)
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")
    assert {path.name for path in (tmp_path / "C").iterdir()} == {path.name for path in (tmp_path / "D").iterdir()}
    commits = [f"{name}@{head(published, name)}" for name in ("org/a", "org/b")]
    assert config_of(tmp_path / "C")["model_path_list"] == commits
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    assert [each["path"] for each in report["inputs"]] == commits
    assert "huggingface" not in json.dumps(report) + json.dumps(config_of(tmp_path / "C"))  # No folder of the cache.

    published.status = 503
    asked = len(published.asked)
    said = call("verify", "C", folder=tmp_path)
    assert (said.status, said.err.splitlines()[0]) == (0, f"verifying {tmp_path / 'C'}")
    assert "fetching" not in said.err
    assert "all merged again, with the same bytes" in said.out
    assert len(published.asked) == asked

    published.status = None
    published.add("org/a", files={"config.json": b"{}", "model.safetensors": b"something new"})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    said = call("verify", "C", folder=tmp_path)
    assert said.status == 0
    assert any(f"nothing was merged again: {commit} is not in the cache" in said.out for commit in commits)
    assert call("verify", "C", "--full", folder=tmp_path).out.count("all merged again, with the same bytes") == 1
    said = call("merge", "C/merge_config.json", "--output_path", "E", folder=tmp_path)
    assert said.status == 0, said.err
    assert weights_of(tmp_path / "E") == weights_of(tmp_path / "C")
    assert config_of(tmp_path / "E")["model_path_list"] == commits


def test_from_python(published: Hub, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model_path_list": ["org/a", "org/b"], "hub_endpoint": published.endpoint}
    plan = package.check(**settings)
    assert plan.recipe.inputs == tuple(HubName(name, head(published, name)) for name in ("org/a", "org/b"))
    result = package.merge(**settings, output_path=tmp_path / "C")
    assert result.merged == len(large(1))
    package.merge(model_path_list=["local/a", "local/b"], output_path=tmp_path / "D")
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")
    assert package.verify(tmp_path / "C").recomputed == len(large(1))
    with pytest.raises(HubError, match="no model of that name"):
        package.merge(**{**settings, "model_path_list": ["org/a", "org/c"]}, output_path=tmp_path / "E")


# What is fetched

SETTINGS = {"config.json"}
#: What is needed of every model, to say what they contradict each other in.
COMPARED = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
SHARDS = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
INDEX = {"model.safetensors.index.json"}


def test_only_what_the_merge_needs_is_fetched(published: Hub, merge: Run) -> None:
    torch = {"pytorch_model.bin": b"the same in another format", "pytorch_model.bin.index.json": b"{}"}
    published.add("org/a", Path("local/a"), torch)
    merge(*words(published, "org/a", "org/b"))
    assert published.fetched("org/a") == {*SHARDS, *INDEX, *SETTINGS, *SERVED}
    assert published.fetched("org/b") == {"model.safetensors", *SETTINGS, *COMPARED}
    sent = sum(published.sent.values())
    merge(*words(published, "org/a", "org/b", out="D"))  # All is in the cache.
    assert sum(published.sent.values()) == sent


def test_with_a_base_it_is_the_base_whose_other_files_are_needed(published: Hub, merge: Run) -> None:
    merge(*words(published, "org/a"), "--base_model_path", "org/b", "--merge_method", "linear")
    assert published.fetched("org/a") == {*SHARDS, *INDEX, *SETTINGS, *COMPARED}
    assert published.fetched("org/b") == {"model.safetensors", *SETTINGS, *SERVED}


def test_only_the_shards_that_the_index_names(published: Hub, merge: Run) -> None:
    published.add(
        "org/a", Path("local/a"), {"consolidated.safetensors": b"x", "model-00004-of-00004.safetensors": b"x"}
    )
    merge(*words(published, "org/a", "org/b"))
    assert published.fetched("org/a") & {"consolidated.safetensors", "model-00004-of-00004.safetensors"} == set()


def test_prefixes_and_other_formats(hub: Hub, merge: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = large(1)
    folder = make_model(tmp_path / "a", tensors, prefix="master_weights", files={"model.safetensors": "not these"})
    hub.add("org/a", folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    torch.save({name: torch.from_numpy(each) for name, each in tensors.items()}, tmp_path / "b" / "master_weights.bin")
    hub.add("org/b", tmp_path / "b", {"master_weights.pdparams": b"the same once more"})
    merge(*words(hub, "org/a", "org/b", out=tmp_path / "C"), "--merge_prefix", "master_weights")
    assert hub.fetched("org/a") == {"master_weights.safetensors", *SETTINGS}
    assert hub.fetched("org/b") == {"master_weights.bin", *SETTINGS}


def test_files_that_the_recipe_names_come_from_the_lead(
    published: Hub, merge: Run, refuse: Run, tmp_path: Path
) -> None:
    more = ["--copy_file_list", "README.md", "original/params.json"]
    merge(*words(published, "org/a", "org/b"), *more)
    assert (tmp_path / "C" / "original" / "params.json").read_text() == "{}"
    assert "README.md" in published.fetched("org/a") - published.fetched("org/b")
    commit = head(published, "org/a")
    refuse("merge", *words(published, "org/a", "org/b", out="D"), "--copy_file_list", "no.txt",
           says=[f"copy_file_list names no.txt, which is not in org/a@{commit}"])  # fmt: skip


def test_adapters_and_their_base(hub: Hub, merge: Run, modelfuse: Run, tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base")
    peft, _ = adapter_of(tmp_path / "peft", 3, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    paddle = make_paddle(tmp_path / "paddle", {
        "model.layers.0.mlp.up_proj.lora_A": np.ones((8, 2), np.float32),
        "model.layers.0.mlp.up_proj.lora_B": np.ones((2, 10), np.float32),
    })  # fmt: skip
    hub.add("org/base", base)
    hub.add("org/peft", peft, {"README.md": b"about", "optimizer.pt": b"state"})
    hub.add("org/paddle", paddle)
    more = ["--base_model_path", "org/base", "--hub_endpoint", hub.endpoint, "--output_path"]
    said = modelfuse("check", "--model_path_list", "org/peft", "org/paddle", *more, tmp_path / "C")
    assert said.status == 0, said.err
    merge("--model_path_list", "org/peft", "org/paddle", *more, tmp_path / "C")
    merge("--model_path_list", peft, paddle, "--base_model_path", base, "--output_path", tmp_path / "D")
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")
    assert hub.fetched("org/peft") == {"adapter_model.safetensors", "adapter_config.json"}
    assert hub.fetched("org/paddle") == {"peft_model.safetensors", "lora_config.json"}
    merge("--lora_model_path", "org/peft", *more, tmp_path / "E", "--output_format", "lora")
    config = json.loads((tmp_path / "E" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", head(hub, "org/base"))


def test_all_models_are_fetched_at_once(published: Hub, merge: Run) -> None:
    """Neither answer begins before the other one is asked for."""
    both, met = threading.Barrier(2), []

    def before(file: str) -> None:
        if file in ("org/a/model-00001-of-00003.safetensors", "org/b/model.safetensors") and file not in met:
            both.wait(20)
            met.append(file)

    with cached_headers(published):
        published.before = before
        merge(*words(published, "org/a", "org/b"))
    assert len(met) == 2


@contextmanager
def cached_headers(hub: Hub) -> Iterator[None]:
    """Headers are read one request after another: nothing is to wait for them here."""
    from modelfuse.planning.hub import download

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "can_be_read", lambda _: False)
        yield


def test_progress_counts_every_byte_once(published: Hub) -> None:
    counted: list[int] = []
    wholes: list[int] = []

    @contextmanager
    def fetching(whole: int) -> Iterator[Callable[[int], None]]:
        wholes.append(whole)
        yield counted.append

    recipe = Recipe.parse({"model_path_list": ["org/a", "org/b", "org/b@main"], "hub_endpoint": published.endpoint})
    fetch(recipe, FetchDisplay(fetching))
    assert wholes == [sum(counted)]
    assert sum(counted) > sum(each.nbytes for seed in (1, 2) for each in large(seed).values())


def test_tokens_go_to_the_hub_and_nowhere_else(published: Hub, merge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", published.token)
    published.repositories["org/b"].private = True
    merge(*words(published, "org/a", "org/b"))
    assert {each.headers["host"] for each in published.asked if "authorization" in each.headers} == {
        f"127.0.0.1:{published.port}"
    }
    assert any(each.headers["host"].startswith("localhost") for each in published.asked)


@pytest.fixture
def stranger(published: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Another server with the same models, which would like to have the token of the user."""
    monkeypatch.setenv("HF_TOKEN", published.token)
    with serving() as hub:
        hub.repositories = published.repositories
        hub.blobs = published.blobs
        yield hub


def with_endpoint(path: Path, content: dict[str, Any], endpoint: str) -> Path:
    path.write_text(json.dumps({**content, "hub_endpoint": endpoint}))
    return path


@pytest.mark.parametrize("command", ["merge", "check"])
def test_a_recipe_does_not_say_where_tokens_go(
    stranger: Hub, published: Hub, modelfuse: Run, refuse: Run, tmp_path: Path, command: str
) -> None:
    content = {"model_path_list": ["org/a", "org/b"], "hub_anonymous": True}
    recipe = with_endpoint(tmp_path / "r.json", content, stranger.endpoint)
    words = [command, recipe, "--output_path", "C"]
    refuse(*words, says=["127.0.0.1", "where your token is sent"], hint=f"--hub_endpoint {stranger.endpoint}")
    assert not stranger.asked
    assert modelfuse(*words, "--hub_anonymous").status == 0
    assert stranger.asked
    assert not any("authorization" in each.headers for each in stranger.asked)
    with_endpoint(recipe, content, f"{published.endpoint}/")  # Where they would go anyway.
    assert modelfuse(*words, "--overwrite").status == 0


def test_an_endpoint_on_the_command_line_gets_the_token(stranger: Hub, modelfuse: Run, tmp_path: Path) -> None:
    recipe = with_endpoint(tmp_path / "r.json", {"model_path_list": ["org/a", "org/b"]}, "http://127.0.0.1:1")
    assert modelfuse("check", recipe, "--hub_endpoint", stranger.endpoint).status == 0
    assert {each.headers["authorization"] for each in stranger.asked if "authorization" in each.headers} == {
        f"Bearer {stranger.token}"
    }


def test_no_endpoint_is_recorded(stranger: Hub, merge: Run, tmp_path: Path) -> None:
    """The commits decide the bytes."""
    merge(*words(stranger, "org/a", "org/b"))
    assert config_of(tmp_path / "C")["hub_endpoint"] is None
    assert stranger.endpoint not in (tmp_path / "C" / "merge_report.json").read_text()


def test_an_output_does_not_say_where_tokens_go(
    stranger: Hub, published: Hub, modelfuse: Run, merge: Run, tmp_path: Path, cache: Path
) -> None:
    """Not even to merge all of it again."""
    merge(*words(published, "org/a", "org/b"))
    config = tmp_path / "C" / "merge_config.json"
    with_endpoint(config, json.loads(config.read_text()), stranger.endpoint)
    for words_ in ([], ["--full"]):
        modelfuse("verify", "C", *words_)
        assert not stranger.asked
    shutil.rmtree(cache)
    said = modelfuse("verify", "C", "--full")
    assert "has hub names looked up at 127.0.0.1" in said.err
    assert not stranger.asked
    modelfuse("verify", "C", "--full", "--hub_anonymous")
    assert stranger.asked
    assert not any("authorization" in each.headers for each in stranger.asked)
    shutil.rmtree(cache)
    stranger.asked.clear()
    modelfuse("verify", "C", "--full", "--hub_endpoint", published.endpoint)
    assert not stranger.asked


def test_a_recipe_names_no_cluster(
    refuse: Run, published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray runs on this machine what a cluster sends it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "r.json").write_text(
        json.dumps({"model_path_list": ["local/a", "local/b"], "engine": "ray", "ray_address": "example.org:6379"})
    )
    refuse("check", "r.json", says=["names the Ray cluster at example.org:6379"], hint="--ray_address example.org:6379")


# check


def test_the_tokenizer_may_come_from_a_model_that_is_no_input(
    hub: Hub, merge: Run, modelfuse: Run, tmp_path: Path
) -> None:
    tensors = large(1)
    for name in ("a", "b"):
        hub.add(f"org/{name}", make_model(tmp_path / name, tensors))
    files = {"tokenizer.json": '{"x": 1}', "chat_template.jinja": "{{ x }}", "README.md": "x", "config.json": "{}"}
    (tmp_path / "t").mkdir()
    for file, content in files.items():
        (tmp_path / "t" / file).write_text(content)
    hub.add("org/t", tmp_path / "t", {"model.safetensors": b"never fetched"})
    given = [*words(hub, "org/a", "org/b", out=tmp_path / "C"), "--tokenizer_from", "org/t"]
    said = modelfuse("check", *given)
    assert said.status == 0, said.err
    merge(*given)
    assert hub.fetched("org/t") == files.keys() - {"README.md"}
    assert (tmp_path / "C" / "chat_template.jinja").read_text() == "{{ x }}"
    recipe = json.loads((tmp_path / "C" / "merge_config.json").read_text())
    assert recipe["tokenizer_from"] == f"org/t@{head(hub, 'org/t')}"


def test_check_reads_headers_only(published: Hub, modelfuse: Run, cache: Path, tmp_path: Path) -> None:
    said = modelfuse(
        "check", *words(published, "org/a", "org/b"), "--merge_method", "ties", "--base_model_path", "org/b"
    )
    assert said.status == 0, said.err
    local = modelfuse("check", "--model_path_list", "local/a", "local/b", "--base_model_path", "local/b",
                      "--merge_method", "ties", "--output_path", "C")  # fmt: skip
    plans = [
        [line.split() for line in each.out.splitlines() if "@" not in line and str(tmp_path) not in line]
        for each in (said, local)
    ]
    assert plans[0] == plans[1]
    assert len(plans[0]) > 5
    assert f"org/a@{head(published, 'org/a')}" in said.out
    assert not list(cache.rglob("*.safetensors"))
    assert max(published.sent.values()) <= 100_000
    assert published.fetched("org/b") <= {"model.safetensors", "modules.json", *SETTINGS, *COMPARED}


def test_inspect_reads_headers_only(published: Hub, modelfuse: Run, cache: Path) -> None:
    said = modelfuse("inspect", "org/a", "--hub_endpoint", published.endpoint)
    assert said.status == 0, said.err
    assert said.out.startswith(f"org/a@{head(published, 'org/a')}\n")
    assert "embed_tokens.weight" in said.out
    weights = [path for path in published.sent if path.endswith(".safetensors")]
    assert sum(published.sent[path] for path in weights) <= len(weights) * 100_000
    assert not [*cache.rglob("*.safetensors")]
    assert modelfuse("inspect", "org/absent", "--hub_endpoint", published.endpoint).status == 2


def test_diff_fetches_what_can_be_compared(published: Hub, modelfuse: Run, tmp_path: Path) -> None:
    published.add("org/c", make_model(tmp_path / "c", {"other.weight": np.ones((3, 500_000), np.float32)}))
    refused = modelfuse("diff", "org/a", "org/c", "--hub_endpoint", published.endpoint)
    assert refused.status == 2
    assert "no tensors of the same name and shape" in refused.err
    assert published.sent["org/c/model.safetensors"] < 1_000_000
    said = [modelfuse("diff", f"{place}/a", f"{place}/b", "--json", "--hub_endpoint", published.endpoint).out
            for place in ("org", "local")]  # fmt: skip
    there, here = (json.loads(each) for each in said)
    assert there["base"] == f"org/a@{head(published, 'org/a')}"
    assert there["tensors"] == here["tensors"] != []


def test_check_reads_long_headers_and_from_servers_without_ranges(hub: Hub, modelfuse: Run, tmp_path: Path) -> None:
    tensors = {f"model.layers.{number}.mlp.up_proj.weight": np.ones((64, 8), np.float32) for number in range(2000)}
    hub.add("org/a", make_model(tmp_path / "a", tensors))
    header = 8 + int.from_bytes((tmp_path / "a" / "model.safetensors").read_bytes()[:8], "little")
    assert header > 200_000
    more = ["--model_path_list", "org/a", "org/a", "--hub_endpoint", hub.endpoint]
    said = modelfuse("check", *more)
    assert said.status == 0, said.err
    assert "2000" in said.out
    assert hub.sent["org/a/model.safetensors"] == 100_000 + header
    hub.ranges = False
    assert modelfuse("check", *more).out == said.out


def test_check_of_what_is_cached_asks_for_no_weights(published: Hub, merge: Run, modelfuse: Run) -> None:
    merge(*words(published, "org/a", "org/b"))
    sent = dict(published.sent)
    said = modelfuse("check", *words(published, "org/a", "org/b", out="D"))
    assert said.status == 0
    assert published.sent == sent


def test_check_says_that_other_formats_are_fetched_whole(hub: Hub, modelfuse: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "a").mkdir()
    torch.save({"x": torch.ones(10_000)}, tmp_path / "a" / "pytorch_model.bin")
    hub.add("org/a", tmp_path / "a")
    said = modelfuse("check", "--model_path_list", "org/a", "org/a", "--hub_endpoint", hub.endpoint)
    assert said.status == 0, said.err
    assert "note: Weights that are not safetensors files are fetched whole, not only their headers: org/a." in said.err
    assert "float32" in said.out


def test_a_plan_of_headers_cannot_be_run(published: Hub, tmp_path: Path) -> None:
    from modelfuse.execution.run import run_plan

    plan = package.check(
        model_path_list=["org/a", "org/b"], output_path=tmp_path / "C", hub_endpoint=published.endpoint
    )
    with pytest.raises(package.CheckpointError, match="No such file"):
        run_plan(plan)
    assert not (tmp_path / "C").exists()


# Before anything large is fetched


def test_models_that_do_not_fit_are_refused_by_their_headers(published: Hub, refuse: Run, tmp_path: Path) -> None:
    published.add("org/c", make_model(tmp_path / "local" / "c", large(3, rows=201)))
    refuse("merge", *words(published, "org/a", "org/c"), says=["model.embed_tokens.weight", "[201, 300]"])
    assert all(size <= 100_000 for size in published.sent.values())


def test_an_output_that_exists_is_refused_before_the_hub_is_asked(published: Hub, refuse: Run, tmp_path: Path) -> None:
    make_model(tmp_path / "C", random_tensors(1))
    refuse("merge", *words(published, "org/a", "org/b"), says=["exists and is not empty"])
    assert published.asked == []


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (1000, ["in the cache", "only 1 kB are free there"]),
        (2_500_000, ["in the cache", "and their merge ", "kB on the same disk"]),
    ],
)
def test_room_for_what_is_fetched_and_for_the_output(
    published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, free: int, says: list[str]
) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refuse("merge", *words(published, "org/a", "org/b"), says=says)
    if free == 1000:
        refuse("check", *words(published, "org/a", "org/b"), says=says)
    assert all(size <= 100_000 for size in published.sent.values())


# Revisions


def test_branches_tags_and_commits(published: Hub, merge: Run, tmp_path: Path) -> None:
    repository = published.repositories["org/b"]
    first = head(published, "org/b")
    other = make_model(tmp_path / "local" / "other", large(7))
    files = {path.name: path.read_bytes() for path in other.iterdir()}
    second = repository.commit(files, branch="refs/pr/1")
    results = {}
    for revision, commit in (("main", first), ("refs/pr/1", second), (first, first), (second, second)):
        merge(*words(published, "org/a", f"org/b@{revision}"), "--overwrite")
        assert config_of(tmp_path / "C")["model_path_list"][1] == f"org/b@{commit}"
        results[revision] = weights_of(tmp_path / "C")
    assert results["main"] == results[first] != results["refs/pr/1"] == results[second]


class EndedEarly:
    """Ends a merge after its first span, as Ctrl-C would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends = True
        keep = OutputFolder.keep

        def kept(folder: OutputFolder, *given: Any) -> None:
            keep(folder, *given)
            if self.ends:
                raise KeyboardInterrupt

        monkeypatch.setattr(OutputFolder, "keep", kept)
        monkeypatch.setattr(atomic_folder, "WORTH_KEEPING", 0, raising=False)


def test_a_merge_goes_on_while_the_commits_are_the_same(
    published: Hub, modelfuse: Run, merge: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = EndedEarly(monkeypatch)
    assert modelfuse("merge", *words(published, "org/a", "org/b")).status == 130
    ended.ends = False
    assert "Resuming the interrupted run" in merge(*words(published, "org/a", "org/b")).err
    merge("--model_path_list", "local/a", "local/b", "--output_path", "D")
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")

    ended.ends = True
    assert modelfuse("merge", *words(published, "org/a", "org/b", out="E")).status == 130
    ended.ends = False
    published.add("org/b", Path("local/b"), {"CHANGES": b"another commit"})
    said = merge(*words(published, "org/a", "org/b", out="E"))
    assert "Starting over: the commit of org/b has changed since the last run" in said.err


# A hub that cannot be asked


@pytest.fixture
def cached(published: Hub, merge: Run) -> Hub:
    """Both models are in the cache, and there is one merge of them."""
    merge(*words(published, "org/a", "org/b", out="before"))
    published.sent.clear()
    return published


def fail(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a hub unreachable; returns where it is now."""
    if how == "refuses connections":
        return "http://127.0.0.1:1"
    if how == "does not answer":
        monkeypatch.setattr(client, "TIMEOUT", 0.2)
        monkeypatch.setattr(Hub, "status", property(lambda _: time.sleep(0.6)), raising=False)
    elif how == "is no hub":
        hub.status = 200
    else:
        hub.status = int(how)
    return hub.endpoint


WAYS = ["503", "500", "429", "refuses connections", "does not answer", "is no hub"]


@pytest.mark.parametrize("how", WAYS)
def test_the_cached_copy_is_taken_with_a_warning(
    cached: Hub, merge: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    endpoint = fail(cached, how, monkeypatch)
    said = merge("--model_path_list", "org/a", "org/b", "--output_path", "C", "--hub_endpoint", endpoint)
    for name in ("org/a", "org/b"):
        assert f"note: {name} cannot be fetched from {endpoint}" in said.err
        assert f"; the cached copy of {name}@{head(cached, name)} is used." in said.err
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "before")
    assert config_of(tmp_path / "C")["model_path_list"] == config_of(tmp_path / "before")["model_path_list"]


@pytest.mark.parametrize("how", WAYS)
def test_without_a_cached_copy_that_is_an_error(
    published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    endpoint = fail(published, how, monkeypatch)
    refuse("merge", "--model_path_list", "org/a", "org/b", "--output_path", "C", "--hub_endpoint", endpoint,
           says=[f"cannot be fetched from {endpoint}: ", "the cache has no copy of it"],
           hint="hf download org/")  # fmt: skip


def test_the_api_warns(cached: Hub, tmp_path: Path) -> None:
    cached.status = 503
    with pytest.warns(UserWarning, match="the cached copy of org/b@"):
        package.merge(model_path_list=["local/a", "org/b"], output_path="C", hub_endpoint=cached.endpoint)
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "before")


def test_a_commit_that_is_cached_needs_no_hub(cached: Hub, merge: Run) -> None:
    cached.status = 503
    asked = len(cached.asked)
    assert "note" not in merge("before/merge_config.json", "--output_path", "C").err
    assert len(cached.asked) == asked


def test_offline(cached: Hub, merge: Run, refuse: Run, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(cached.asked)
    assert "note" not in merge(*words(cached, "org/a", "org/b")).err
    refuse("merge", *words(cached, "org/a", "models/mistrl", out="D"),
           says=["models/mistrl cannot be fetched: HF_HUB_OFFLINE is set", "the cache has no copy of it", cache],
           hint="there is no models/mistrl here")  # fmt: skip
    refuse("merge", *words(cached, "org/a", "org/b@v2", out="D"), hint="hf download org/b --revision v2")
    assert len(cached.asked) == asked


def test_offline_as_the_environment_says(cached: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--model_path_list", "org/a", "org/b", "--output_path"]
    assert call("merge", *given, "C", folder=tmp_path).status == 0
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    said = call("merge", *given, "D", folder=tmp_path)
    assert said.status == 2
    assert "HF_HUB_OFFLINE is set" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model-00002-of-00003.safetensors", "without model-00002-of-00003.safetensors"),
        ("model.safetensors.index.json", "without model.safetensors.index.json"),
        ("tokenizer.json", "without tokenizer.json"),
    ],
)
def test_a_part_of_a_model_in_the_cache_is_no_copy(
    cached: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, cache: Path, file: str, says: str
) -> None:
    (cache / "models--org--a" / "snapshots" / head(cached, "org/a") / file).unlink()
    cached.status = 503
    refuse("merge", *words(cached, "org/a", "org/b"), says=["the cached copy is incomplete", says])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse("merge", *words(cached, "org/a", "org/b"), says=["HF_HUB_OFFLINE", says])


def test_what_others_have_cached_is_taken_with_a_word_on_what_may_be_missing(
    cached: Hub, merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(constants.HF_ASSETS_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = merge(*words(cached, "org/a", "org/b"))
    assert f"note: org/a@{head(cached, 'org/a')} is used from the cache, which has no list of its files" in said.err


def test_what_is_missing_is_fetched_again(cached: Hub, merge: Run, cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--org--a" / "snapshots" / head(cached, "org/a")
    shard = snapshot / "model-00002-of-00003.safetensors"
    shard.resolve().unlink()
    merge(*words(cached, "org/a", "org/b"))
    assert set(cached.sent) == {"org/a/model-00002-of-00003.safetensors"}
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "before")


def test_a_hub_that_goes_down_meanwhile(
    published: Hub, refuse: Run, merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # Those of huggingface_hub between its attempts.
    monkeypatch.setattr(parallel_jobs, "MOST", 1)

    def before(file: str) -> None:
        if file == "org/a/model-00002-of-00003.safetensors":
            published.status = 503

    with cached_headers(published):
        published.before = before
        refuse("merge", *words(published, "org/a", "org/b"), says=["cannot be fetched", "503", KEPT])
    published.status, published.before = None, lambda _: None
    published.sent.clear()
    merge(*words(published, "org/a", "org/b"))
    assert set(published.sent) == {"org/a/model-00003-of-00003.safetensors"}  # What was finished is there.


# What is refused


@pytest.mark.parametrize("name", ["models/mistrl", "org/a-b.c"])
def test_a_name_that_is_nowhere(published: Hub, refuse: Run, name: str) -> None:
    says = [f"There is no folder {name} here, and no model of that name at {published.endpoint}"]
    refuse("merge", *words(published, "org/a", name), says=says, hint="Check the name")
    refuse("check", *words(published, name, "org/a"), says=says, hint="hf auth login")


def test_a_revision_that_is_not_there(published: Hub, refuse: Run) -> None:
    for revision in ("v7", "0" * 40):
        refuse("merge", *words(published, "org/a", f"org/b@{revision}"), says=[f"org/b has no revision {revision} at"])


def test_gated_and_private_models(published: Hub, refuse: Run, merge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(published, "org/a", "org/b")
    published.repositories["org/b"].gated = True
    refuse(
        "merge", *given, says=["org/b is gated"], hint=f"{published.endpoint}/org/b, then log in with `hf auth login`"
    )
    published.repositories["org/b"].private = True
    refuse("merge", *given, says=["no model of that name"], hint="HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refuse("merge", *given, says=["no model of that name"])
    monkeypatch.setenv("HF_TOKEN", published.token)
    merge(*given)


@pytest.mark.parametrize(
    ("status", "says"), [(401, "refuses org/"), (403, "refuses org/"), (404, "no model"), (418, "418")]
)
def test_other_answers(published: Hub, refuse: Run, status: int, says: str) -> None:
    published.status = status
    refuse("merge", *words(published, "org/a", "org/b"), says=[says])


def test_a_model_without_weights(published: Hub, refuse: Run) -> None:
    published.add("org/c", files={"README.md": b"weights follow", "config.json": b"{}"})
    commit = head(published, "org/c")
    refuse("merge", *words(published, "org/a", "org/c"),
           says=[f"org/c@{commit} holds no checkpoint: looked for model.safetensors, pytorch_model.bin"])  # fmt: skip
    published.add("org/c", files={"model-00002-of-00002.safetensors": b"the first is not there"})
    refuse("merge", *words(published, "org/a", "org/c"), says=["holds 1 of 2 shards"])
    published.add("org/c", files={"master_weights.safetensors": b"others"})
    refuse("merge", *words(published, "org/a", "org/c"), hint="--merge_prefix master_weights")


def test_an_index_that_names_what_is_not_there(published: Hub, refuse: Run) -> None:
    for file, says in (("model-9.safetensors", "is missing"), ("../../up.safetensors", "which is not in its folder")):
        index = json.dumps({"weight_map": {"x": file}}).encode()
        published.add("org/c", files={"model.safetensors.index.json": index})
        refuse("merge", *words(published, "org/a", "org/c"), says=[file, says])


def test_a_full_disk(published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from huggingface_hub import file_download

    def full(*given: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    refuse("merge", *words(published, "org/a", "org/b"),
           says=["does not fit on the disk of the cache", cache], hint="HF_HOME")  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
            "stored in the cache: /cache/x: Permission denied",
        ),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "cannot be fetched from http://127"),
        (RuntimeError("of Xet"), "of Xet"),
        (OSError("Consistency check failed"), "Consistency check failed"),
    ],
)
def test_failures_of_any_kind(
    published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception, says: str
) -> None:
    import huggingface_hub

    def fails(*given: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    refuse("merge", *words(published, "org/b", "org/b@main"), says=[says])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_to(published: Hub, refuse: Run, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    refuse("merge", *words(published, "org/a", "org/b"), says=["cannot be stored in the cache"], hint="HF_HOME")


def test_without_the_library(published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse("merge", *words(published, "org/a", "models/mistrl"),
           says=["There is no folder org/a here", "huggingface_hub"],
           hint=f"pip install '{_installed_from()}[hub]'")  # fmt: skip
    with pytest.raises(MissingExtraError):
        package.check(model_path_list=["org/a", "org/b"])


def test_unmerged_from_a_hub_name(published: Hub, merge: Run, refuse: Run, tmp_path: Path) -> None:
    for number, name in enumerate("cd"):
        tensors = {**large(number), "ids": np.full(5, number)}
        published.add(f"org/{name}", make_model(tmp_path / "local" / name, tensors))
    given = words(published, "org/c", "org/d")
    merge(*given, "--unmerged_from", "org/d")
    merge("--model_path_list", "local/c", "local/d", "--unmerged_from", "local/d", "--output_path", "D")
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")
    assert config_of(tmp_path / "C")["unmerged_from"] == f"org/d@{head(published, 'org/d')}"
    refuse("merge", *given, "--overwrite", "--unmerged_from", "org/a", says=["org/a, which is none of the models"])


@pytest.mark.parametrize("endpoint", ["hub.example.org", "ftp://x", "https://", ""])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(package.RecipeError, match=r"hub_endpoint is .*: this is no address"):
        Recipe.parse({"model_path_list": ["a", "b"], "hub_endpoint": endpoint})


# Answers that mean harm


@dataclass
class Said_by_hub:
    sha: object
    siblings: list[Any]


@dataclass
class Sibling:
    rfilename: object
    size: object


@pytest.mark.parametrize(
    ("sha", "files"),
    [
        ("../../../../tmp/x", {"model.safetensors": 5}),
        (None, {"model.safetensors": 5}),
        ("0" * 40, {"model.safetensors": None}),
        ("0" * 40, {"model.safetensors": -1}),
        ("0" * 40, {"model.safetensors": 5, "a\0b": 1}),
    ],
)
def test_listings_that_are_none(
    published: Hub, refuse: Run, monkeypatch: pytest.MonkeyPatch, sha: object, files: dict[str, object]
) -> None:
    import huggingface_hub

    said = Said_by_hub(sha, [Sibling(name, size) for name, size in files.items()])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: said)
    refuse("merge", *words(published, "org/a", "org/b"), says=["its answer lacks the commit, or file names or sizes"])


def test_names_that_lead_out_of_the_folder_are_not_followed(
    published: Hub, merge: Run, cache: Path, tmp_path: Path
) -> None:
    bad = dict.fromkeys(("../up.json", "..", "additional_chat_templates/../../up.jinja", "1_Pooling/../../up.json",
                         "1_Pooling/..", "/up.json", "a/b.json"), b"x")  # fmt: skip
    published.add("org/a", Path("local/a"), bad)
    merge(*words(published, "org/a", "org/b"))
    assert published.fetched("org/a") == {*SHARDS, *INDEX, *SETTINGS, *SERVED}


# The cache


def test_blobs_that_all_models_share(published: Hub, merge: Run, cache: Path, tmp_path: Path) -> None:
    """Files that were stored by their content once for all models are links out of the model's own blobs."""
    merge(*words(published, "org/a", "org/b"))
    blob = (cache / "models--org--a" / "snapshots" / head(published, "org/a") / "tokenizer.json").resolve()
    (cache / "blobs" / "ab").mkdir(parents=True)
    shared = cache / "blobs" / "ab" / blob.name
    blob.rename(shared)
    blob.symlink_to(shared)
    merge(*words(published, "org/a", "org/b", out="D"))
    assert (tmp_path / "D" / "tokenizer.json").read_text() == "{}"


# Interrupted


def test_interrupted_and_gone_on_with(published: Hub, tmp_path: Path) -> None:
    """While one model waits for an answer that does not come, and the other one is there."""
    reached, on = threading.Event(), threading.Event()
    size = (tmp_path / "local" / "b" / "model.safetensors").stat().st_size

    def before(file: str) -> None:
        if file == "org/a/model-00001-of-00003.safetensors" and published.sent[file]:  # The header was read before.
            while published.sent["org/b/model.safetensors"] < size:
                time.sleep(0.01)
            reached.set()
            on.wait(60)

    published.before = before
    given = ["merge", "--model_path_list", "org/b", "org/a", "--output_path", "C"]
    with start(*given, folder=tmp_path) as process:
        try:
            assert reached.wait(60)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)  # Less than what an answer is waited for.
        finally:
            on.set()
            process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-2:] == ["interrupted", KEPT]
    assert sorted(os.listdir(tmp_path)) == ["local"]
    published.before = lambda _: None
    published.sent.clear()
    assert call(*given, folder=tmp_path).status == 0
    assert "org/b/model.safetensors" not in published.sent
    assert "org/a/model-00001-of-00003.safetensors" in published.sent
    call("merge", "--model_path_list", "local/b", "local/a", "--output_path", "D", folder=tmp_path)
    assert weights_of(tmp_path / "C") == weights_of(tmp_path / "D")


def test_the_first_failure_ends_the_others() -> None:
    began, ended = threading.Event(), threading.Event()

    def waits(stop: parallel_jobs.StopFlag) -> None:
        began.set()
        try:
            while True:
                stop.check()
                time.sleep(0.01)
        finally:
            ended.set()

    def fails(_: parallel_jobs.StopFlag) -> None:
        began.wait()
        raise HubError("this one")

    with pytest.raises(HubError, match="this one"):
        parallel_jobs.run_parallel([waits, fails, *[waits] * 20])
    assert ended.is_set()
    assert parallel_jobs.run_parallel([partial(lambda each, _: each, each) for each in range(50)]) == list(range(50))
    assert parallel_jobs.run_parallel([]) == []


def test_nothing_of_it_is_loaded_without_hub_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from modelfuse.cli.main import main; main(sys.argv[1:]);"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('huggingface_hub', 'httpx2', 'tqdm')))"
    )
    command = [sys.executable, "-c", code, "merge", "--quiet", "--model_path_list", *map(str, pair)]
    done = subprocess.run([*command, "--output_path", str(tmp_path / "C")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_models_of_the_hub_are_tuned(published: Hub, tmp_path: Path) -> None:
    """Fetched once; each trial merges the same commits."""
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    recipe = {
        "model_path_list": ["org/a", "org/b"],
        "weight_list": {"tune": [0, 1]},
        "output_path": str(tmp_path / "C"),
    }
    words: dict[str, Any] = {"hub_endpoint": published.endpoint, "progress": False}
    found = package.tune(recipe, lambda folder: float(folder.name[-1]), 3, **words)
    assert [each.number for each in found.trials] == [0, 1, 2]
    commits = [f"{name}@{head(published, name)}" for name in ("org/a", "org/b")]
    assert config_of(tmp_path / "C")["model_path_list"] == commits
    assert all(commit in (tmp_path / "C.tune" / "best.yaml").read_text() for commit in commits)
