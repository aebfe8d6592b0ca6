"""Connects: the Ray Serve application, its HTTP ingress, client handle and command line."""
