"""Files of weights: safetensors, and pickles of torch and Paddle, which are read without running anything."""
