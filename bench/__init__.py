"""Benchmarks, and the tables made of their results."""
