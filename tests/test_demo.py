"""The demo's models, its evaluator against transformers, and the claims that its README makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from demo import evaluate, recipes
from demo.llama import Llama, log_probabilities, read_safetensors
from demo.run import SHIPPED, merge_all
from demo.tokenizer import END, Tokenizer
from demo.tune import kept

DEMO = Path(evaluate.__file__).parent
TEXTS = ("code", "prose", "arithmetic")
ODD = "naïve café — ½ 😀\n\n\n   tabs\tand  spaces   \r\nx=-1.5e3" + END + "\x00 a_b'c\u00a0d"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SHIPPED / "base" / "tokenizer.json")


@pytest.fixture(scope="module")
def exam(tokenizer: Tokenizer) -> evaluate.Exam:
    return evaluate.Exam(tokenizer, windows=8, pairs=40)


@pytest.fixture(scope="module")
def scores(exam: evaluate.Exam) -> dict[str, evaluate.Score]:
    return {name: exam.score(Llama(SHIPPED / name)) for name in recipes.MODELS}


@pytest.mark.parametrize("text", [*TEXTS, "odd"])
def test_tokens_are_those_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares token numbers with transformers")
    content = ODD if text == "odd" else (DEMO / "heldout" / f"{text}.txt").read_text(encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(SHIPPED / "base")
    assert tokenizer.encode(content) == theirs(content, add_special_tokens=False)["input_ids"]


def test_tokens_give_the_text_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD


@pytest.mark.parametrize("name", recipes.MODELS)
def test_logits_are_those_of_transformers(tokenizer: Tokenizer, name: str) -> None:
    torch = pytest.importorskip("torch", reason="compares logits with torch")
    transformers = pytest.importorskip("transformers", reason="compares logits with transformers")
    text = (DEMO / "heldout" / "prose.txt").read_text(encoding="utf-8")
    numbers = np.array(tokenizer.encode(text[:2000])[:400], np.int64).reshape(4, 100)
    theirs = transformers.LlamaForCausalLM.from_pretrained(SHIPPED / name, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(numbers)).logits.numpy()
    np.testing.assert_allclose(Llama(SHIPPED / name).logits(numbers), wanted, rtol=1e-3, atol=1e-3)


def test_grouped_heads_without_a_tied_head_are_read_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares logits with torch")
    transformers = pytest.importorskip("transformers", reason="compares logits with transformers")
    shape = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(shape).eval()
    model.save_pretrained(tmp_path)
    numbers = np.arange(40, dtype=np.int64).reshape(2, 20)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(numbers)).logits.numpy()
    np.testing.assert_allclose(Llama(tmp_path).logits(numbers), wanted, rtol=1e-4, atol=1e-5)


def test_probabilities_sum_to_one() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 2, 7)).astype(np.float32) * 30
    total = sum(np.exp(log_probabilities(logits, np.array([[0, token]], np.int64)))[0, 0] for token in range(7))
    assert total == pytest.approx(1, abs=1e-5)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes.fromhex("803f20c0"))
    assert read_safetensors(tmp_path / "x.safetensors")["x"].tolist() == [1.0, -2.5]


def test_answers_are_found_whole(tokenizer: Tokenizer, exam: evaluate.Exam) -> None:
    passage = exam.passages["arithmetic"]
    row, start, end = passage.answers[0]
    words = tokenizer.decode(passage.numbers[row].tolist())
    answer = tokenizer.decode(passage.numbers[row, start + 1 : end + 1].tolist())
    assert answer[:-1].isdigit()
    assert answer.endswith("\n")
    assert answer in words


@pytest.mark.parametrize("domain", TEXTS)
def test_each_expert_knows_its_domain_best(scores: dict[str, evaluate.Score], domain: str) -> None:
    marks = {name: getattr(score, domain) for name, score in scores.items()}
    assert min(marks, key=lambda name: marks[name]) == domain


def test_alignment_has_a_tax(scores: dict[str, evaluate.Score]) -> None:
    base, aligned = scores["base"], scores["aligned"]
    assert aligned.preference > base.preference + 0.4
    assert aligned.sums < base.sums - 0.1
    assert aligned.average > 2 * base.average


@pytest.mark.parametrize("name", ["linear", "ties", "della"])
def test_a_merge_is_better_over_all_than_any_expert(
    exam: evaluate.Exam, scores: dict[str, evaluate.Score], tmp_path: Path, name: str
) -> None:
    folders = {name: SHIPPED / name for name in recipes.MODELS}
    merge_all([merge for merge in recipes.DOMAIN_MERGES if merge.name == name], folders, tmp_path)
    merged = exam.score(Llama(folders[name]))
    assert merged.average < min(score.average for score in scores.values())


def test_settings_are_not_chosen_on_what_is_judged(tokenizer: Tokenizer) -> None:
    """No window of the texts is in both halves."""
    halves = [evaluate.Exam(tokenizer, 10_000, 1, tuning=tuning).passages for tuning in (True, False)]
    for domain in TEXTS:
        tuned, judged = ({row.tobytes() for row in half[domain].numbers} for half in halves)
        assert tuned
        assert judged
        assert not tuned & judged


def test_a_merge_keeps_shares_of_what_experts_gained() -> None:
    def score(*marks: float) -> evaluate.Score:
        return evaluate.Score(*marks, sums=0.0, preference=0.0)  # type: ignore[misc]  # marks are the other fields

    marks = {"base": score(16.0, 4.0, 9.0), "code": score(4.0, 9.0, 9.0), "prose": score(16.0, 2.0, 9.0)}
    marks["arithmetic"] = score(16.0, 4.0, 1.0)
    # Half of the way in nats, all of it, and a step back of as much.
    assert kept(score(8.0, 2.0, 81.0), marks) == pytest.approx({"code": 0.5, "prose": 1.0, "arithmetic": -1.0})


def test_the_results_written_down_are_those_of_the_recipes() -> None:
    results = json.loads((DEMO / "results.json").read_text(encoding="utf-8"))
    shown = {merge.name for merge in recipes.DOMAIN_MERGES if merge.shown}
    on_the_way = {name for names in recipes.paths().values() for name in names}
    assert set(results) == {*recipes.MODELS, *shown, *on_the_way}
