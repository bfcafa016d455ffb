"""The methods as compiled loops over stored bytes."""
