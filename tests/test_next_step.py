"""The last line of a merge: what loads a model of this kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Said, make_model

TENSORS = {"layer.weight": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(("config", "files", "says"), [
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, {}, "  vllm serve {}\n"),
    ({"model_type": "llama"}, {}, "  vllm serve {}\n"),
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, {}, "  vllm serve {}\n"),
    ({"architectures": ["BertForSequenceClassification"]}, {},
     "  BertForSequenceClassification.from_pretrained('{}')  # of transformers"),
    ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, {},
     "  WhisperForConditionalGeneration.from_pretrained('{}')  # of transformers"),
    ({"_class_name": "UNet2DConditionModel"}, {}, "  UNet2DConditionModel.from_pretrained('{}')  # of diffusers"),
    ({"architectures": ["BertModel"]}, {"modules.json": "[]"}, "  SentenceTransformer('{}')"),
])  # fmt: skip
def test_it_fits_the_model(
    tmp_path: Path, merge: Callable[..., Said], config: dict[str, object], files: dict[str, str], says: str
) -> None:
    models = [make_model(tmp_path / name, TENSORS, config=config, files=files) for name in "AB"]
    said = merge("--model_path_list", *models, "--output_path", tmp_path / "out")
    assert says.format(tmp_path / "out") in said.out
    assert f"  modelfuse verify {tmp_path / 'out'}\n" in said.out
    assert said.out.count("vllm") == says.count("vllm")
