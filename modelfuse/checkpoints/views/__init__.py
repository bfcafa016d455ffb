"""Stored tensors seen otherwise: in another order, or fp8 as values."""
