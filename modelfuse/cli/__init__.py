"""The command line: words in, text out."""
