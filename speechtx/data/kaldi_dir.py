"""A data directory with Kaldi's contracts: reading, writing and validating it; docs/data_dir.md describes the files."""

from __future__ import annotations

from speechtx.data.kaldi_table import Segment, read_segments, read_table, read_utt2spk, write_table

__all__ = ["Segment", "read_segments", "read_table", "read_utt2spk", "write_table"]
