"""Merging shown on real models: five small language models and what becomes of them."""
