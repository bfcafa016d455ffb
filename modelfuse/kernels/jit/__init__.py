"""Kernels are compiled when they are first called, and their machine code is kept."""
