"""Search the settings of a recipe by merging and evaluating: ``modelfuse tune``."""
