"""What a running app shows: metrics, logs, traces, explanations."""
