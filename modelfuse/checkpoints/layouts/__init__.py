"""The layouts of transformers and PaddleFormers: told apart, and one brought into the other."""
