"""What the mini corpus says: census-form speech in the manner of AN4, made from templates.

Names are spelled letter by letter, numbers are said digit by digit, dates are birthdays, commands edit a form. Everything is
drawn from the word lists below; nothing is taken from AN4's transcripts. Letters are words of one character, as in AN4:
`R A B E L`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]
_TEENS = ["TEN", "ELEVEN", "TWELVE", "THIRTEEN", "FOURTEEN", "FIFTEEN", "SIXTEEN", "SEVENTEEN", "EIGHTEEN", "NINETEEN"]
_TENS = ["TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY"]
_MONTHS = [
    "JANUARY",
    "FEBRUARY",
    "MARCH",
    "APRIL",
    "MAY",
    "JUNE",
    "JULY",
    "AUGUST",
    "SEPTEMBER",
    "OCTOBER",
    "NOVEMBER",
    "DECEMBER",
]
_EDITS = ["ENTER", "ERASE", "RUBOUT", "REPEAT"]
_MOVES = ["GO TO", "START AT", "STOP AT", "HELP WITH"]
_NAMES = """
ABBOTT ADRIAN AGNES ALVAREZ AMY ANNA ANTON ARTHUR BAXTER BECKY BENGT BLAKE BOYLE BRUNO CAROL CHAVEZ CHLOE CLYDE COX CYNTHIA
DAISY DANIEL DIAZ DIXON DOYLE EDITH ELLIOT EMMA ENZO ERIK EZRA FAITH FELIX FIONA FOX FRITZ GEORGE GIBBS GLENN GOMEZ GRACE GWEN
HAZEL HECTOR HIRSCH HOLLY HUXLEY IDA INGRID IRIS ISAAC IVAN JACOB JANE JENKINS JOEL JUDY KAMINSKI KATE KEVIN KNOX KURT KYLE
LARS LEWIS LIZ LUCY LYNN MABEL MAGNUS MARTINEZ MAX MILDRED NADIA NGUYEN NINA NORRIS OLGA OLIVER OSCAR OWEN PAULA PEREZ PHILIP
PIERCE QUENTIN QUIGLEY QUINN RALPH REX RITA ROXANNE RUTH SAMUEL SCHMIDT SIMON STELLA SVEN TARIQ TESS TOBIAS TRIXIE UMBERTO
URSULA VALDEZ VERA VICTOR VIVIAN WALTER WENDY WOJCIK XAVIER XENA YOLANDA YORK YUSUF YVONNE ZACK ZELDA ZIEGLER ZOE
"""

_SPOKEN_LETTERS = {"A": "eigh", "I": "eye", "Z": "zee"}


def number(value: int) -> str:
    """1 to 99 in words."""
    if value < 10:
        return DIGITS[value]
    if value < 20:
        return _TEENS[value - 10]
    tens = _TENS[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens} {DIGITS[value % 10]}"


def _spelled_name(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return " ".join(rng.choice(_NAMES.split()))
    # Names of our own making keep rare letters as frequent as common ones.
    return " ".join(rng.choices(LETTERS, k=rng.randint(3, 6)))


def _digit_string(rng: random.Random) -> str:
    return " ".join(rng.choices(DIGITS, k=rng.randint(3, 7)))


def _date(rng: random.Random) -> str:
    day = f"{rng.choice(_MONTHS)} {number(rng.randint(1, 31))}"
    return day if rng.random() < 0.3 else f"{day} NINETEEN {number(rng.randint(10, 99))}"


def _edit(rng: random.Random) -> str:
    return " ".join([rng.choice(_EDITS), rng.choice(LETTERS), number(rng.randint(0, 99))])


def _move(rng: random.Random) -> str:
    target = (
        f"LETTER {rng.choice(LETTERS)}" if rng.random() < 0.2 else f"{rng.choice(['LINE', 'PAGE'])} {number(rng.randint(1, 99))}"
    )
    answer = rng.choice(["", "", "YES ", "NO "])
    return f"{answer}{rng.choice(_MOVES)} {target}"


_TEMPLATES: list[tuple[float, Callable[[random.Random], str]]] = [
    (0.28, _digit_string),
    (0.26, _date),
    (0.14, _edit),
    (0.17, _move),
]


def sentences(seed: str, *, spelled: float, seen: set[str]) -> Iterator[str]:
    """Endless different sentences; the same ones in the same order for a seed.

    Args:
        seed: of the random choices.
        spelled: the share of spelled names; the others keep their proportions.
        seen: sentences that must not come again; grows by each one that is given out.
    """
    rng = random.Random(seed)
    weights = [weight for weight, _ in _TEMPLATES]
    while True:
        make = _spelled_name if rng.random() < spelled else rng.choices([make for _, make in _TEMPLATES], weights)[0]
        sentence = make(rng)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def spoken_form(sentence: str) -> str:
    """What eSpeak is asked to say for a transcript.

    It would read a lone A as the article and swallow an I, so these are written as they sound; Z is American. Words are in
    lower case because eSpeak takes some words in capitals for abbreviations.
    """
    return " ".join(_SPOKEN_LETTERS.get(word, word) if len(word) == 1 else word.lower() for word in sentence.split())
