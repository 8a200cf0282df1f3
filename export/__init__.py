"""Checkpoints written as files for other runtimes."""
