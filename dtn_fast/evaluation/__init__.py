"""Metrics, the paper's protocols, and their tables and figures."""
