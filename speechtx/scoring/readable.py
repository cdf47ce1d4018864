"""sclite's alignment and confusion reports, with the words spelled as in the transcripts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from speechtx.scoring.trn import TokenTable

_WORD_AT_END = re.compile(r"^(\s+\d+:\s+\d+\s+->\s+)(\S+)(?: ==> (\S+))?$")


def render_alignments(alignments: Mapping[str, Sequence[tuple[str, str | None, str | None]]]) -> str:
    """The alignments in the layout of sclite's .pra: REF over HYP in columns, errors marked below."""
    parts = []
    for utterance, steps in alignments.items():
        counts = " ".join(str(sum(step[0] == kind for step in steps)) for kind in "CSDI")
        ref, hyp, marks = ["REF: "], ["HYP: "], ["Eval:"]
        for kind, ref_word, hyp_word in steps:
            # As sclite shows it: a gap is stars as long as the word it stands against.
            left = ref_word if ref_word is not None else "*" * _width(hyp_word or "")
            right = hyp_word if hyp_word is not None else "*" * _width(ref_word or "")
            width = max(_width(left), _width(right))
            ref.append(left + " " * (width - _width(left)))
            hyp.append(right + " " * (width - _width(right)))
            marks.append((kind if kind != "C" else " ").ljust(width))
        lines = [" ".join(column).rstrip() for column in (ref, hyp, marks)]
        parts.append("\n".join([f"id: ({utterance})", f"Scores: (#C #S #D #I) {counts}", *lines]) + "\n")
    return "\n".join(parts)


def decode_confusions(report: str, words: TokenTable) -> str:
    """sclite's .dtl with every token in its lists of confusions replaced by the word it stands for."""
    lines = []
    for line in report.splitlines():
        match = _WORD_AT_END.match(line)
        if match:
            line = match[1] + words.word(match[2]) + (f" ==> {words.word(match[3])}" if match[3] else "")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _width(text: str) -> int:
    """Columns of a terminal that the text takes: two for wide East Asian characters, none for combining marks."""
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Mn", "Me")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )
