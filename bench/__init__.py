"""Benchmarks, and the tables of their results."""
