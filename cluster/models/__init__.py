"""The default model, and where any other one is found."""
