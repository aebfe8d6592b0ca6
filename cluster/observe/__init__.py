"""What users see of a running app: metrics, logs, traces, explanations."""
