"""The methods over tensors of torch or Paddle."""
