"""Views of stored tensors: elements in another order, and dequantized fp8."""
