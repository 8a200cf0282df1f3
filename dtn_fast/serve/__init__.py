"""HTTP service for detection."""
