"""Configurations of arcee's mergekit become operations: which tensor is made of which, and what goes beside them."""
