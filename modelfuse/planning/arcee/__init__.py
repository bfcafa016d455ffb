"""Plans of mergekit configurations: the operations of all tensors, and the files beside the weights."""
