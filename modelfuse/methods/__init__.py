"""What is done to tensors: the plain definitions that every kernel is tested against."""
