"""Fused ops over tensors and slots. Knows nothing of graphs, models or files."""
