"""The output: a folder, here or in a store, that appears whole or not at all."""
