"""Models of different vocabularies: which token each row of an embedding is for, and rows in another order."""
