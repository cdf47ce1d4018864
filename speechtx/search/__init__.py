"""Search: from encoder output to text, greedy and beam, plain and batched, and the Python API over it."""
