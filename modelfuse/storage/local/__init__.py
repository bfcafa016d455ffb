"""Files of this machine: the journal, locks, the page cache, and calls that Python lacks."""
