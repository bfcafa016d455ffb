"""A plan carried out: bytes read, merged, and written."""
