"""Pictures of a trained model's insides."""
