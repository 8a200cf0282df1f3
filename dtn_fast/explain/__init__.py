"""Pictures and values of a trained model's internals."""
