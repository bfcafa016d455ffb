"""Everything beside the weights is compared: configuration, tokenizers, templates, stop tokens, code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, make_model

import modelfuse

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
          "num_attention_heads": 4, "hidden_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "max_position_embeddings": 64, "hidden_act": "silu", "torch_dtype": "float32"}  # fmt: skip
TENSORS = {"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((5, 8), np.float32)}


def words(*tokens: str, added: tuple[str, ...] = ()) -> str:
    """A tokenizer.json."""
    more = [{"id": len(tokens) + number, "content": token, "special": True} for number, token in enumerate(added)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps({"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": more})


def trio(tmp_path: Path, changes: Mapping[str, object], **files: Mapping[str, str]) -> dict[str, Any]:
    """A base and two models, the second of another configuration; files by the model's name."""
    for name in ("base", "a", "b"):
        config = {**CONFIG, **changes} if name == "b" else CONFIG
        config = {key: value for key, value in config.items() if value is not None}
        make_model(tmp_path / name, TENSORS, config=config, files=files.get(name))
    return {"base_model_path": tmp_path / "base", "model_path_list": [tmp_path / "a", tmp_path / "b"]}


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_attention_heads": 8}, "num_attention_heads is 4 in {base}, but 8 in {b}"),
    ({"head_dim": 4}, "head_dim is 2 in {base}, but 4 in {b}"),
    ({"model_type": "mistral"}, 'model_type is "llama" in {base}, but "mistral" in {b}'),
    ({"architectures": ["MistralForCausalLM"]}, 'architectures is "LlamaForCausalLM" in {base}'),
    ({"hidden_act": "gelu"}, 'hidden_act is "silu" in {base}, but "gelu" in {b}'),
    ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06 in {base}, but 0.001 in {b}"),
])  # fmt: skip
def test_what_makes_an_average_meaningless_is_refused(
    tmp_path: Path, refuse: Callable[..., str], changes: dict[str, object], says: str
) -> None:
    settings = trio(tmp_path, changes)
    words = ["--base_model_path", settings["base_model_path"], "--model_path_list", *settings["model_path_list"],
             "--output_path", tmp_path / "out"]  # fmt: skip
    says = says.format(base=tmp_path / "base", b=tmp_path / "b")
    for command in ("check", "merge"):
        refuse(command, *words, says=[f"config.json: {says}"], hint="--allow_mismatch")
    plan = modelfuse.check(**settings, allow_mismatch=True)
    assert any(says in warning and "is used" in warning for warning in plan.warnings)


@pytest.mark.parametrize(("changes", "says"), [
    ({"rope_theta": 1e6}, "rope"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope"),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope"),
    ({"max_position_embeddings": 512}, "max_position_embeddings"),
    ({"torch_dtype": None, "dtype": "bfloat16"}, "dtype"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ({"something_new": 3}, None),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
    ({"torch_dtype": None, "dtype": "float32"}, None),
    ({"attention_dropout": 0.1, "transformers_version": "5", "use_cache": False}, None),
    ({"architectures": ["LlamaForSequenceClassification"]}, None),
])  # fmt: skip
def test_what_else_differs_is_told_once_with_whose_is_taken(
    tmp_path: Path, modelfuse: Callable[..., Said], changes: dict[str, object], says: str | None
) -> None:
    settings = trio(tmp_path, changes)
    said = modelfuse("check", "--base_model_path", settings["base_model_path"], "--model_path_list",
                     *settings["model_path_list"])  # fmt: skip
    assert said.status == 0
    assert ("no problems found" in said.out) == (says is None)
    if says is not None:
        assert f"warning: config.json: {says} is " in said.out
        assert f"; that of {tmp_path / 'base'} is used" in said.out
        assert "can be merged, with 1 warning" in said.out


def test_tokens_that_are_two_or_would_be_lost(tmp_path: Path) -> None:
    settings = trio(
        tmp_path, {}, base={"tokenizer.json": words("x", "y", "z")}, a={"tokenizer.json": words("x", "z", "y")},
        b={"tokenizer.json": words("x", "y", "z", added=("<think>", "</think>"))},
    )  # fmt: skip
    plan = modelfuse.check(**settings)
    moved, lost = plan.warnings
    assert f"{tmp_path / 'a'}: its tokenizer gives 2 token ids to other tokens (1 is 'y' and 'z'" in moved
    assert f"{tmp_path / 'b'}: the output's tokenizer lacks 2 of its tokens: <think>, </think>" in lost
    assert f"--tokenizer_from {tmp_path / 'b'}" in lost


def test_templates_and_stop_tokens_that_only_the_models_have(tmp_path: Path) -> None:
    chat = {"chat_template.jinja": "{{ messages }}", "generation_config.json": json.dumps({"eos_token_id": [2, 7]}),
            "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"})}  # fmt: skip
    base = {"tokenizer_config.json": json.dumps({"eos_token": "</s>", "chat_template": None})}
    settings = trio(tmp_path, {"eos_token_id": 3}, base=base, a=chat, b={**chat, "code.py": "1"})
    plan = modelfuse.check(**settings)
    told = "\n".join(plan.warnings)
    names = f"{tmp_path / 'a'} and {tmp_path / 'b'}"
    assert f"{names}: it has a chat template, and the output has none; that of {tmp_path / 'base'} is used" in told
    assert f"{names}: it stops generation at the tokens 2, 7, which do not stop the output's" in told
    assert f"{names}: its eos_token is '<|im_end|>', the output's '</s>'" in told
    assert len(plan.warnings) == 3
    plan = modelfuse.check(**settings, tokenizer_from=tmp_path / "a")
    assert not plan.warnings
    modelfuse.merge(**settings, tokenizer_from=tmp_path / "b", output_path=tmp_path / "out")
    for name, content in chat.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert not (tmp_path / "out" / "code.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    modelfuse.merge(**json_settings(tmp_path / "out"), output_path=tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def json_settings(folder: Path) -> dict[str, Any]:
    recipe = json.loads((folder / "merge_config.json").read_text())
    return {key: value for key, value in recipe.items() if key not in ("modelfuse_version", "output_path", "overwrite")}


def test_an_adapter_s_tokenizer_counts_and_any_folder_may_be_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    settings = trio(tmp_path, {}, base={"tokenizer.json": words("x", "y")})
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(words("x", "y", "z"))
    (folder / "notes.txt").write_text("not of a tokenizer")
    modelfuse.merge(**settings, tokenizer_from=folder, output_path=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == words("x", "y", "z")
    assert not (tmp_path / "out" / "notes.txt").exists()
    given = ["--base_model_path", tmp_path / "base", "--model_path_list", tmp_path / "a", tmp_path / "b"]
    (folder / "tokenizer.json").unlink()
    refuse("check", *given, "--tokenizer_from", folder, says=["tokenizer_from", "which has no tokenizer"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from conftest import save_file

    save_file(adapter / "adapter_model.safetensors", {
        "base_model.model.lm_head.lora_A.weight": np.ones((1, 8), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((5, 1), np.float32),
    })  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (adapter / "chat_template.jinja").write_text("{{ x }}")
    plan = modelfuse.check(lora_model_path=adapter, base_model_path=tmp_path / "base")
    assert any(f"{adapter}: it has a chat template" in warning for warning in plan.warnings)


def test_processors_and_code(tmp_path: Path) -> None:
    one = {"preprocessor_config.json": json.dumps({"size": 224, "image_processor_type": "A"}), "modeling_x.py": "a = 1"}
    other = {"preprocessor_config.json": json.dumps({"size": 336}), "modeling_x.py": "a = 2"}
    plan = modelfuse.check(**trio(tmp_path, {}, base=one, a=one, b=other))
    assert [warning.partition(";")[0] for warning in plan.warnings] == [
        f"{tmp_path / 'b'}: its preprocessor_config.json differs",
        f"{tmp_path / 'b'}: its code differs: modeling_x.py",
    ]


def test_values_of_any_type_are_compared_or_refused(tmp_path: Path) -> None:
    """Never a traceback, whatever the files say."""
    import random

    values = [None, True, -1, 1.5, "x", [], [[1]], [1, "a", None], {}, {"a": 1}, [{"id": 1}], ["a b", 3]]
    keys = {
        "config.json": ["model_type", "architectures", "rope_theta", "rope_scaling", "num_attention_heads",
                        "hidden_size", "text_config", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "dtype"],
        "generation_config.json": ["eos_token_id", "temperature"],
        "tokenizer_config.json": ["eos_token", "chat_template"],
        "tokenizer.json": ["model", "added_tokens", "normalizer"], "preprocessor_config.json": ["size"],
    }  # fmt: skip
    draw = random.Random(7)
    for number in range(60):
        models = []
        for name in "ab":
            made = {
                file: {key: draw.choice(values) for key in own if draw.random() < 0.6} for file, own in keys.items()
            }
            files = {file: json.dumps(content) for file, content in made.items() if file != "config.json"}
            models.append(make_model(tmp_path / f"{number}{name}", TENSORS, config=made["config.json"], files=files))
        try:
            modelfuse.check(model_path_list=models, allow_mismatch=draw.random() < 0.5)
        except modelfuse.ModelfuseError:
            continue
