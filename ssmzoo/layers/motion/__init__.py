"""Layers of models that read or write motion, (b frames c)."""
