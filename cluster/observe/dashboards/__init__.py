"""What is shown of the metrics: dashboards for Grafana or as pictures, and alerts."""
