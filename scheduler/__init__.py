"""Decides: which worker serves a request, what a step computes. No clock and no I/O, except that
`scheduler.simulation` reads traces and device profiles from files."""
