"""Observation of a server: metrics, totals, the dashboard's snapshots, logs and traces."""
