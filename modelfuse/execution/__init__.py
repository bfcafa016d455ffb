"""Execute a plan: read, merge and write the tensors."""
