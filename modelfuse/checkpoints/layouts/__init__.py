"""Detect and convert the layouts of transformers and PaddleFormers."""
