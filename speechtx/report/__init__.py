"""Report: figures that people look at. Reads experiments and tensors, computes no score of its own."""
