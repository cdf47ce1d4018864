"""The errors a user may see. Each message says what is wrong, where, why, and what to do about it.

Every deliberate failure of the package raises one of these; the command line prints the message without a traceback and
exits with status 1. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class SpeechtxError(ValueError):
    """Base class of every error that is the input's fault, not the program's."""


class ConfigError(SpeechtxError):
    """A configuration file or an override is wrong: unknown key, wrong type, impossible combination."""


class DataError(SpeechtxError):
    """A data directory, a table, an archive or a transcript is wrong; the message names file, line and utterance."""


class AudioError(DataError):
    """One recording cannot be used: missing, empty, truncated, corrupt, too short, or at the wrong rate."""


class ScoringError(SpeechtxError):
    """References and hypotheses cannot be joined, or sclite is missing or answered something unexpected."""


class ExperimentError(SpeechtxError):
    """An experiment directory is incomplete, or disagrees with what it is asked to do."""


class TrainingError(SpeechtxError):
    """Training cannot go on: too many non-finite steps, nothing left to train on, a checkpoint of another model."""
