"""Attention: the penalty (what), the kernels (how fast), the multi-head layer. Knows nothing of speech."""
