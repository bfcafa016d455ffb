"""The command line: parsing of arguments, commands, and printing of their results."""
