"""What a merge computes: each method declared in a file of its own, and the registry that names them."""
