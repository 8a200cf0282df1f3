"""Export of checkpoints to files for other runtimes."""
