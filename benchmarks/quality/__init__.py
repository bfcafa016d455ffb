"""Which method keeps most of what experts have learnt: ``python -m benchmarks.quality`` (``make bench-quality``)."""
