"""MambaTalk's audio encoder and its stacks of Mamba blocks."""
