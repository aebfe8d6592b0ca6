"""A discrete-event cluster around the real schedulers: traces in, latencies out."""
