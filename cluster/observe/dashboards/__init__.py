"""What is made of the metrics: dashboards, for Grafana or as pictures, and alerts."""
