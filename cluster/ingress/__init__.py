"""The HTTP front end, and its client of the workers."""
