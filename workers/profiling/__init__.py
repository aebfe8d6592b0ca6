"""Measuring what an engine's steps cost."""
