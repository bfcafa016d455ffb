"""Compile kernels on first call, and cache their machine code."""
