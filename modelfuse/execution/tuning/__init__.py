"""The settings of a recipe searched for, by merging and evaluating again and again."""
