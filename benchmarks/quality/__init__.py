"""Benchmark of the quality of merges, by method: ``python -m benchmarks.quality`` (``make bench-quality``)."""
