"""Graphs as data: digits as graphs of pixels, generated transfer over long distances, files of one's own, PyG by name.

A graph is a dict of tensors: x (n f), edge_index (2 m), edge_attr (m k) or none, y, and what encodings add per node.
"""
