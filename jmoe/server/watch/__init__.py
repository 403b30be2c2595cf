"""What is observed of a server: metrics, totals, the dashboard's snapshots, logs, traces."""
