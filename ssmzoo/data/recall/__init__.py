"""Synthetic recall: sequences in which something seen before is asked for, with labels where it is asked for only."""
