"""Training and self-distillation."""
