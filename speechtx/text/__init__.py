"""Text: normalisation of transcripts and the tokenizer. Knows strings, never audio or models."""
