"""Graphs: batches as named tensors, local message passing, the GPS layer, encodings, the skeleton of a model.

v nodes, m edges, g graphs, d width. An edge goes from edge_index[0] (source j) to edge_index[1] (target i).
"""
