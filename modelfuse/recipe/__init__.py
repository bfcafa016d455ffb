"""What the user asked for: every setting, checked once."""
