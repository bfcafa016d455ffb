"""The request: all settings, checked once."""
