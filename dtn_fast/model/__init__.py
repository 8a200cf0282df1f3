"""The detector: its configuration, layers, folding for inference, and every model that it is compared with."""
