"""Mixtures of experts made of dense models: mergekit-moe's configurations become operations."""
