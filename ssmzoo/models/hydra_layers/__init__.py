"""Layers of Hydra (models/hydra_lm.py) that no other system uses: mixer, chunk-routed experts, memories."""
