"""Plans of mergekit-moe configurations: mixtures of experts made of dense models."""
