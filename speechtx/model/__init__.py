"""Model: subsampling, encoder, decoder, losses. Knows tensors, never files."""
