"""Real classes of transformers in tiny sizes, as it saves them: merged, loaded clean, and equal to a merge by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_models import make

import modelfuse

pytestmark = pytest.mark.filterwarnings("ignore")
WHY = "merges models of transformers"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
TEXT: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
BERT = {**TEXT, "num_key_value_heads": None}
MOE = {**TEXT, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 16, "patch_size": 8}  # fmt: skip
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {"vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
               "patch_size": 4}  # fmt: skip
VL_TOKENS = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
ROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}

#: A class, its configuration's, and its settings.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8, "tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {**TEXT, "num_experts": 2, "num_experts_per_tok": 1}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **TEXT, **MLA, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 2, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        **TEXT, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 8}),
    "Gemma 3, text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", {**TEXT, "pad_token_id": 0}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {**BERT, "num_kv_heads": 2}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 48, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {
        "vocab_size": 48, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {
        "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "Mamba 2": ("Mamba2ForCausalLM", "Mamba2Config", {
        "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8,
        "n_groups": 1}),
    "Jamba": ("JambaForCausalLM", "JambaConfig", {
        **TEXT, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}),
    "BERT": ("BertModel", "BertConfig", BERT),
    "BERT, masked": ("BertForMaskedLM", "BertConfig", BERT),
    "BERT, classes": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", {
        "vocab_size": 48, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", {**BERT, "pad_token_id": 0}),
    "DeBERTa v2": ("DebertaV2Model", "DebertaV2Config", BERT),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "T5, gated and untied": ("T5ForConditionalGeneration", "T5Config", {
        **T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        **BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {
        **BERT, "vocab_size": 16, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}),
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),
    "Swin": ("SwinForImageClassification", "SwinConfig", {
        "image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "CLIP": ("CLIPModel", "CLIPConfig", {
        "text_config": {**BERT, "projection_dim": 8}, "vision_config": VISION, "projection_dim": 8}),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"text_config": BERT, "vision_config": VISION}),
    "LLaVA": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {"model_type": "llama", **TEXT}, "image_token_index": 40,
        "vision_config": {"model_type": "clip_vision_model", **VISION}}),
    "Gemma 3": ("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": {**TEXT, "head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4,
        "image_token_index": 40, "boi_token_index": 41, "eoi_token_index": 42}),
    "Qwen2.5-VL": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": {**TEXT, "rope_scaling": ROPE}, **VL_TOKENS,
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]}}),
    "Qwen3-VL": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {
        "text_config": {**TEXT, "head_dim": 8, "rope_scaling": ROPE}, **VL_TOKENS,
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}}),
}  # fmt: skip


def create(case: str, noise: int) -> Any:
    cls, config, settings = CASES[case]
    return make(lambda: getattr(transformers, cls)(getattr(transformers, config)(**settings)), noise)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_loads_clean_and_is_what_a_merge_by_hand_is(tmp_path: Path, case: str) -> None:
    models = {name: create(case, noise) for name, noise in (("base", 0), ("a", 1), ("b", 2))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    settings: dict[str, Any] = {"base_model_path": tmp_path / "base",
                                "model_path_list": [tmp_path / "a", tmp_path / "b"]}  # fmt: skip
    plan = modelfuse.check(**settings)
    assert not plan.warnings
    modelfuse.merge(**settings, output_path=tmp_path / "out", merge_method="linear", weight_list=[0.75, 0.25])
    loaded, info = type(models["base"]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    got, one, other = (model.state_dict() for model in (loaded, models["a"], models["b"]))
    assert got.keys() == one.keys()
    for name, each in got.items():
        if not each.is_floating_point():
            assert torch.equal(each, one[name]), name
            continue
        want = 0.75 * one[name].double() + 0.25 * other[name].double()
        np.testing.assert_allclose(each.double().numpy(), want.numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_class_s_own_names_beside_those_that_it_saves(tmp_path: Path, case: str) -> None:
    """FSDP and ZeRO store a model under its class's names; transformers saves many under the hub's."""
    base, model = create(case, 0), create(case, 1)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors*"):
        file.unlink()
    state, seen = {}, set[int]()
    for name, each in model.state_dict().items():
        if each.data_ptr() not in seen:  # Of tied tensors, one is stored.
            seen.add(each.data_ptr())
            state[name] = each.clone().contiguous()
    from safetensors.torch import save_file

    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    modelfuse.merge(base_model_path=tmp_path / "base", model_path_list=[tmp_path / "a"], output_path=tmp_path / "out",
                    merge_method="linear")  # fmt: skip
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want = model.state_dict()
    for name, each in loaded.state_dict().items():
        np.testing.assert_allclose(each.double().numpy(), want[name].double().numpy(), rtol=0, atol=1e-6, err_msg=name)
