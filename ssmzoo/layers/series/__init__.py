"""Layers of models that read windows of time series, (b l c)."""
