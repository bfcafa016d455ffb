"""Planning: what a merge does with every tensor, from the recipe and the inputs' headers."""
