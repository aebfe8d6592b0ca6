"""Dashboards, for Grafana or as pictures, and alerts, all from the metrics."""
