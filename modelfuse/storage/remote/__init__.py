"""Remote stores, which are named by URLs."""
