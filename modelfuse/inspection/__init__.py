"""Examine models and outputs: inspect, compare, verify, report on and draw them."""
