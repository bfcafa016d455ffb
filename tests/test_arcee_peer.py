"""Configurations merged as mergekit 0.1.5 merged them; the answers are kept in ``fixtures/peers``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Said, array, make_model, read_file, read_model

PEERS = Path(__file__).parent / "fixtures" / "peers"
KNOWN = json.loads((PEERS / "arcee_configurations.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in KNOWN["cases"]}
#: Differences that are of the peer's float32: relative to a tensor's largest element.
NEAR = 2e-6


def grouped(file: str) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, stored in read_file(PEERS / file)[0].items():
        group, _, tensor = name.partition("/")
        found.setdefault(group, {})[tensor] = array(stored)
    return found


INPUTS, OUTPUTS = (
    grouped("arcee_configurations_inputs.safetensors"),
    grouped("arcee_configurations_outputs.safetensors"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all models that the peer was given."""
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in INPUTS.items():
        words = KNOWN["words"].get(name, KNOWN["words"]["base"])
        tokenizer = {"model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}}}
        make_model(folder / name, tensors, config=KNOWN["config"] | {"vocab_size": len(words)},
                   files={"tokenizer.json": json.dumps(tokenizer)})  # fmt: skip
    return folder


def rows(tensor: np.ndarray, tokens: dict[str, int], order: list[str]) -> np.ndarray:
    """Rows of a tensor in an order of tokens, then what comes behind them."""
    return np.concatenate([tensor[[tokens[token] for token in order]], tensor[len(tokens) :]])


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_gives_what_mergekit_gives(
    models: Path, merge: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, expected = CASES[name], {**OUTPUTS[name]}
    monkeypatch.chdir(models)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(case["configuration"], sort_keys=False))
    merge(tmp_path / "config.yml", "--output_path", tmp_path / "out", "--quiet")
    found: dict[str, Any] = {key: array(each) for key, each in read_model(tmp_path / "out").items()}
    assert found.keys() == expected.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = {
        key: config.get(key, config.get("torch_dtype"))
        for key in case.keys() & {"num_hidden_layers", "vocab_size", "dtype"}
    }
    assert told == {key: case[key] for key in told}
    if "tokens" in case:
        content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
        tokens = dict(content["model"]["vocab"]) | {
            each["content"]: each["id"] for each in content.get("added_tokens", [])
        }
        assert tokens.keys() == case["tokens"].keys()
        order = list(tokens)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            found[key], expected[key] = rows(found[key], tokens, order), rows(expected[key], case["tokens"], order)
    for key, values in expected.items():
        far = np.abs(found[key] - values) > NEAR * np.abs(values).max()
        assert found[key].shape == values.shape
        assert not far.any(), (key, far.sum(), found[key][far][:5], values[far][:5])
