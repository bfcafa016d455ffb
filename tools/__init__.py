"""Programs of the repository: a launcher with Paddle's interface, and generators of files."""
