"""Stores that are named by a URL."""
