"""Outputs sent to a hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Said, make_model, random_tensors, snapshot
from hub_server import Hub, serving

import modelfuse as package
from modelfuse.planning.hub import upload

Run = Callable[..., Said]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("MODELFUSE_HUB_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def output(tmp_path: Path) -> Path:
    models = [make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("AB")]
    package.merge(model_path_list=models, output_path=tmp_path / "C")
    return tmp_path / "C"


def files_of(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs[branch]]


def test_an_output_goes_to_a_private_repository(modelfuse: Run, hub: Hub, output: Path) -> None:
    said = modelfuse("push", output, "me/merged")
    assert said.status == 0, said.err
    assert hub.repositories["me/merged"].private
    sent = files_of(hub, "me/merged")
    assert {name: content for name, content in sent.items() if name != ".gitattributes"} == snapshot(output)
    assert "README.md" in sent
    assert said.out.startswith(f"pushed to {hub.endpoint}/me/merged, private, commit ")
    assert f"such as {output.parent / 'A'}" in said.err


def test_public_if_asked_for_and_on_a_branch(modelfuse: Run, hub: Hub, output: Path) -> None:
    said = modelfuse("push", output, "me/merged@try", "--public", "--json")
    assert said.status == 0, said.err
    assert not hub.repositories["me/merged"].private
    assert "config.json" in files_of(hub, "me/merged", "try")
    assert "config.json" not in files_of(hub, "me/merged")
    document = json.loads(said.out)
    assert document["url"] == f"{hub.endpoint}/me/merged/tree/try"
    assert document["private"] is False


def test_what_is_there_stays_unless_it_is_to_be_replaced(modelfuse: Run, hub: Hub, output: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    hub.add("me/merged", files=old)
    refused = modelfuse("push", output, "me/merged")
    assert refused.status == 2
    assert "has 2 files already" in refused.err
    assert "--overwrite" in refused.err
    assert files_of(hub, "me/merged") == old
    said = modelfuse("push", output, "me/merged", "--overwrite")
    assert said.status == 0, said.err
    sent = files_of(hub, "me/merged")
    assert "model-00001-of-00002.safetensors" not in sent
    assert sent["notes.md"] == b"mine"
    assert "public and stays so" in said.err


def test_what_is_refused(modelfuse: Run, hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, says in (
        ((output, "merged"), "not a name of a model"),
        ((output.parent / "A", "me/m"), "hf upload"),
        ((output.parent / "nowhere", "me/m"), "There is no folder"),
        ((output,), "required"),
    ):
        said = modelfuse("push", *words)
        assert said.status == 2
        assert says in said.err
    assert not hub.asked
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = modelfuse("push", output, "me/merged")
    assert said.status == 2
    assert "may not be written" in said.err
    assert "hf auth login" in said.err
    assert "hf_wrong" not in said.err
    hub.status = 503
    said = modelfuse("push", output, "me/merged", "--json")
    assert (said.status, json.loads(said.out)["kind"]) == (2, "HubError")
    (output / "merge_report.json").write_text("[]")
    assert "edited or damaged" in modelfuse("push", output, "me/merged").err


def test_push_without_the_library_names_the_extra(
    modelfuse: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    said = modelfuse("push", output, "me/merged")
    assert said.status == 2
    assert "huggingface_hub" in said.err
    assert "[hub]" in said.err


def test_the_schema_of_a_push() -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "push.json").read_text())
    assert "private" in json.dumps(schema)
    assert upload.FIRST_FILES
