"""Samples and the readers that make them."""
