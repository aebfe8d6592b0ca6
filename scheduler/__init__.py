"""Decides: which worker serves a request, what a step computes; no clock, no I/O."""
