"""Local files: journal, locks, page cache, and system calls that Python lacks."""
