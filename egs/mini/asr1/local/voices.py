"""Who speaks in the mini corpus: eSpeak variants (a vocal tract and a manner) times English accents.

A variant belongs to one set only, with its close relatives (iven, iven2, ...), so the voices of dev and test are unknown to the
model. Variants that whisper, croak or echo like a robot are left out, and so are those with a `breath` line (f2, f3, f5 and
others): eSpeak synthesises these from memory it never initialised, and no two runs give the same samples. In the training set
each variant speaks with two accents, which makes two speakers.
"""

from __future__ import annotations

from dataclasses import dataclass

_ACCENTS = {"us": "en-us", "gb": "en", "sco": "en-gb-scotland", "nyc": "en-us-nyc", "rp": "en-gb-x-rp", "car": "en-029"}

# In alphabetical order every fifth family went to dev and test in turn, the others to train.
_VARIANTS = {
    "train": """
        adam Alex Andrea Andy Annie antonio aunty belinda boris caleb david Denis ed edward edward2 f1 f4 Gene Gene2
        grandpa gustave Henrique Hugo iven iven2 iven3 iven4 Jacky john klatt klatt2 klatt3 klatt4 linda m1 m2 m4 m5
        m6 m8 m7 m3 marcelo Marco max Michael michel miguel Nguyen norbert pablo paul quincy Reed rob robert steph
        steph2 steph3 travis zac
    """,
    "dev": "anika Diogo ian Mario pedro",
    "test": "benjamin grandma Lee Mike mike2 shelby",
}


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker.

    Attributes:
        speaker: speaker id, such as `f3-us`.
        espeak: eSpeak's name of it, such as `en-us+f3`.
        variant: the variant, which no two sets share.
    """

    speaker: str
    espeak: str
    variant: str


def voices(name: str) -> list[Voice]:
    """The voices of `train`, `dev` or `test`."""
    others = [accent for accent in _ACCENTS if accent != "us"]
    chosen = []
    for index, variant in enumerate(_VARIANTS[name].split()):
        other = others[index % len(others)]
        if name == "train":
            accents = ["us", other]
        else:
            accents = ["us"] if index % 2 == 0 else [other]
        for accent in accents:
            chosen.append(Voice(speaker=f"{variant.lower()}-{accent}", espeak=f"{_ACCENTS[accent]}+{variant}", variant=variant))
    return chosen
