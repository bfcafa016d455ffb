"""The settings as keyword arguments, for type checkers and editors. Written by tools/generate.py."""

# fmt: off
# ruff: noqa: E501
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from modelfuse.storage import Url

Path = str | PathLike[str] | Url


class Keywords(TypedDict, total=False):
    """Every setting; see :class:`modelfuse.Recipe`."""

    model_path_list: Sequence[Path]
    base_model_path: Path | None
    output_path: Path | None
    mergekit: str | None
    mergekit_document: str | None
    intermediate_dir: Path | None
    merge_method: Literal["linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "ties", "della", "della_linear", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "model_stock", "nearswap", "arcee_fusion", "sce", "ram", "ramplus_tl", "pcb", "iso_c", "iso_cts", "tsv_m", "ridge", "swudi", "swudi_a", "regmean"] | str | None
    merge_type: Literal["linear", "slerp", "nuslerp", "multislerp", "karcher", "ties", "model_stock", "nearswap", "arcee_fusion", "sce", "ram", "ramplus_tl", "pcb", "iso_c", "iso_cts", "tsv_m", "ridge", "swudi", "swudi_a", "regmean", "elect"] | str | None
    sparsify_type: Literal["trim", "magprune", "dare", "breadcrumbs", "largest", "random", "random_by_rank"] | str | None
    weight_list: Sequence[float] | None
    normalize: bool | None
    lambda_: float | str | None
    slerp_alpha: float
    slerp_normalize_eps: float
    slerp_dot_threshold: float
    nuslerp_flatten: bool
    nuslerp_row_wise: bool
    multislerp_eps: float
    karcher_max_iter: int
    karcher_tol: float
    reserve_p: float
    rescale: bool
    ties_elect_type: Literal["sum", "count"] | str
    epsilon: float
    gamma: float
    filter_wise: bool
    nearswap_t: float
    select_topk: float
    ram_epsilon: float
    ram_r: float
    ram_alpha: float
    pcb_keep: float
    rank_tolerance: float
    common_fraction: float
    ridge_mu: float
    swudi_time: float
    swudi_share: float
    regmean_shrink: float
    rules: Sequence[Any]
    gram_list: Sequence[Path]
    seed: int
    device: Literal["cpu", "gpu", "low_gpu_mem"] | str
    tensor_type: Literal["np", "pd", "pt"] | str
    gpu_memory: int | str
    allow_cpu_fallback: bool
    n_process: int | None
    memory: int | str
    merge_prefix: Literal["model", "master_weights"] | str
    max_shard_size: int | str
    output_dtype: Literal["float64", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | str | None
    input_layout: Sequence[Literal["hf", "paddle"] | str] | None
    output_format: Literal["hf", "paddle", "pdparams", "lora"] | str | None
    safe_serialization: bool
    convert_from_hf: bool | None
    save_to_hf: bool | None
    lora_rank: int | None
    lora_include: str | None
    lora_exclude: str | None
    lora_epsilon: float
    lora_embeddings: Literal["factors", "whole"] | str
    lora_whole: Sequence[str]
    lora_distribute_scale: bool
    lora_skip_whole: bool
    merge_with_qdq_base_model: bool
    engine: Literal["local", "ray"] | str
    ray_address: str | None
    ray_timeout: float
    overwrite: bool
    on_nonfinite: Literal["error", "propagate"] | str
    unmerged_from: Path | None
    hub_endpoint: str | None
    hub_anonymous: bool
    missing: Sequence[str]
    allow_mismatch: bool
    tokenizer_from: Path | None
    model_card: bool
    tokenizer: str | None
    copy_tokenizer: bool
    truncate_embeddings: bool
    copy_file_list: Sequence[str]
    split_pieces: int
    max_tensor_mem: float
    model_path_str: str
    lora_model_path: Path
    model_prefix: Literal["model", "master_weights"] | str
    t: float
    density: float
