"""Frontend: from a recording to normalised features. Knows samples and frames, never transcripts or models."""
