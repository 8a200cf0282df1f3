"""Model files of every kind, run behind one interface."""
