"""Birdie's pre-training objectives as data: transformations of text, packing, and the mixtures that are drawn from."""
