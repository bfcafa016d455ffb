"""Draw the results of diff and report: interactive pages, and images."""
