"""Open adapters as checkpoints: the base's tensors, with those that the adapter changes computed on read.

Methods act on the products scale·B·A, never on A and B separately. A tensor that an adapter does not change is the
base's own object, so that the plan knows that there is nothing to merge.
"""

from __future__ import annotations

from modelfuse.checkpoints import Checkpoint, open_checkpoint
from modelfuse.checkpoints.adapters.adapter import PADDLE_CONFIG, Adapter, config_of
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl

__all__ = ["Adapter", "is_adapter", "open_adapter"]


def is_adapter(path: PathOrUrl) -> bool:
    """Whether a path is an adapter's folder, or the file with its weights."""
    return config_of(path) is not None


def open_adapter(path: PathOrUrl, base: Checkpoint, *, paddle: bool | None = None, strict: bool = True) -> Adapter:
    """Open an adapter over its base, reading headers only.

    Args:
        path: The adapter's folder, or the one file with its weights.
        base: The model that it was trained on.
        paddle: Whether the base has Paddle's layout, [in, out]; None if unknown.
        strict: Whether non-finite values are an error.

    Raises:
        CheckpointError: If the adapter is missing, malformed or of an unsupported kind.
        MismatchError: If it does not fit the base.
    """
    config = config_of(path)
    if config is None:
        raise CheckpointError(f"{path} is no adapter: it has neither adapter_config.json nor lora_config.json")
    from modelfuse.checkpoints.adapters.apply import lay_over
    from modelfuse.checkpoints.adapters.config import read_settings

    settings = read_settings(config)
    prefix = "peft_model" if config.name == PADDLE_CONFIG else "adapter_model"
    return lay_over(open_checkpoint(path, prefix), settings, base, paddle, strict)
