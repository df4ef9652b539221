"""Time series as windows: files and published layouts, the embedded recording with injected anomalies."""
