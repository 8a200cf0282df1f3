"""Images and videos judged."""
