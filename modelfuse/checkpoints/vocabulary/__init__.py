"""Models with different vocabularies: the token of each row, and rearranged rows."""
