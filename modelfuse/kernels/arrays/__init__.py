"""The methods as operations on numpy arrays or on tensors of torch or Paddle."""
