"""Programs beside the package: Paddle's launcher, and what writes files that follow from the code."""
