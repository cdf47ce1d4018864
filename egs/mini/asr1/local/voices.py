"""Who speaks in the mini corpus: a voice is an eSpeak variant (a vocal tract and a manner) with an English accent.

No voice is in two sets. The variants of dev and test do speak in training too, with other accents: a few minutes of training are
not enough for vocal tracts that were never heard. With the variants themselves divided among the sets, the same model made 10 %
word errors on test, most of them in two variants that sound like no other.
Variants that whisper, croak or echo like a robot are left out, and so are those with a `breath` line (f2, f3, f5 and others):
eSpeak synthesises these from memory it never initialised, and no two runs give the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

_ACCENTS = {"us": "en-us", "gb": "en", "rp": "en-gb-x-rp"}

_VARIANTS = """
    adam Alex Andrea Andy anika Annie antonio aunty belinda benjamin boris caleb david Denis Diogo ed edward edward2
    f1 f4 Gene Gene2 grandma grandpa gustave Henrique Hugo ian iven iven2 iven3 iven4 Jacky john klatt klatt2 klatt3
    klatt4 Lee linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo Marco Mario max Michael michel miguel Mike mike2 Nguyen norbert
    pablo paul pedro quincy Reed rob robert shelby steph steph2 steph3 travis zac
"""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker.

    Attributes:
        speaker: speaker id, such as `f3-us`.
        espeak: eSpeak's name of it, such as `en-us+f3`.
        variant: the variant.
    """

    speaker: str
    espeak: str
    variant: str


def voices(name: str) -> list[Voice]:
    """The voices of `train`, `dev` or `test`: no variant has the same accent in two of them.

    In training each variant has two of the three accents. Every sixth variant is also in dev, and the fifth of each six in test,
    with the accent that it does not have in training.
    """
    accents = list(_ACCENTS)
    chosen = []
    for index, variant in enumerate(_VARIANTS.split()):
        held_out = accents[index % len(accents)]
        if name == "train":
            own = [accent for accent in accents if accent != held_out]
        else:
            own = [held_out] if index % 6 == {"dev": 0, "test": 4}[name] else []
        for accent in own:
            chosen.append(Voice(speaker=f"{variant.lower()}-{accent}", espeak=f"{_ACCENTS[accent]}+{variant}", variant=variant))
    return chosen
