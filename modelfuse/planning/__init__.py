"""A recipe and the headers of its inputs become a plan."""
