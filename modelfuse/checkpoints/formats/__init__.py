"""Weight file formats: safetensors, and pickles of torch and Paddle, which are read without executing code."""
