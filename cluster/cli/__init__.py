"""The command line `xyserve`, a file for each command."""
