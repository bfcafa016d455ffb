"""What was found of models as pictures: one interactive page, and images for papers."""
