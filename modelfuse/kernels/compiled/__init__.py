"""The methods as compiled loops over raw bytes."""
