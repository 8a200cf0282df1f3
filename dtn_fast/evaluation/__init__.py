"""Metrics, the paper's protocols, and tables and figures of them."""
