"""The command line `xyserve`: a file for each command, and what three of the commands use.

`doctor` uses `probes` and `checks`, `simulate` uses `simulation_report` and `simulation_plots`, and
`up` uses `launch`.
"""
