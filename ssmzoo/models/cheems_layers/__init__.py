"""Layers of Cheems (models/cheems.py) that no other system uses: rotary SSD, dynamic mask attention, experts."""
