"""The HTTP front end and what it asks of the workers."""
