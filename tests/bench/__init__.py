"""Benchmarks: ratios of two things measured in one run, with the limit beside them. Never part of the test suite."""
