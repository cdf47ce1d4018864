"""Data: Kaldi data directories, ark/scp, the utterance table, batches. Knows files, never models."""
