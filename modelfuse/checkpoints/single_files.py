"""Diffusion models in one file, as their authors publish them and user interfaces load them, without a config.json."""

from __future__ import annotations

from collections.abc import Iterable

#: What names of parts begin with, and the class of diffusers that loads a file with all of these: the first that fits.
_DENOISER = "model.diffusion_model."
_PIPELINES = (
    ((_DENOISER, "conditioner.embedders."), "StableDiffusionXLPipeline"),
    ((_DENOISER, "text_encoders."), "StableDiffusion3Pipeline"),
    ((_DENOISER, "cond_stage_model."), "StableDiffusionPipeline"),
    ((_DENOISER,), "UNet2DConditionModel"),
    (("double_blocks.", "single_blocks."), "FluxTransformer2DModel"),
)


def loader_of(names: Iterable[str]) -> str | None:
    """The class of diffusers whose ``from_single_file`` loads tensors of these names; None if none is known.

    >>> loader_of(["model.diffusion_model.out.2.bias", "cond_stage_model.model.ln_final.bias"])
    'StableDiffusionPipeline'
    """
    starts = tuple(dict.fromkeys(start for parts, _ in _PIPELINES for start in parts))
    found = {start for name in names for start in starts if name.startswith(start)}
    return next((loader for parts, loader in _PIPELINES if found.issuperset(parts)), None)
