"""The default model, and where other models are found."""
