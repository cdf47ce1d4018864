"""The tree of prefixes against lists of tuples."""

from __future__ import annotations

import random

import torch

from speechtx.search.prefix_tree import PrefixTree, Survivors

Beam = list[tuple[int, ...] | None]


def survive(beam: Beam, rng: random.Random, labels: int) -> tuple[Beam, list[tuple[int, int, bool, bool]]]:
    """A random next beam and, for each slot, source, label, whether it grew and whether it is alive."""
    alive = [j for j, prefix in enumerate(beam) if prefix is not None]
    choices = [(j, 0, False) for j in alive]
    choices += [(j, c, True) for j in alive for c in range(1, labels + 1) if (*beam[j], c) not in beam]
    rng.shuffle(choices)
    choices.sort(key=lambda choice: choice[2] and rng.random() < 0.5)  # so that some stay longer than chance alone would have it
    new: Beam = [None] * len(beam)
    slots = [(rng.randrange(len(beam)), rng.randint(1, labels), rng.random() < 0.3, False) for _ in beam]  # the dead: anything
    slots = [(source, label, False, alive) for source, label, _, alive in slots]
    for slot, (source, label, grown) in zip(rng.sample(range(len(beam)), len(beam)), choices, strict=False):
        if rng.random() < 0.05 and any(new):
            continue
        prefix = beam[source]
        assert prefix is not None
        new[slot] = (*prefix, label) if grown else prefix
        slots[slot] = (source, label, grown, True)
    return new, slots


def test_a_prefix_that_comes_back_is_the_one_that_longer_ones_begin_with():
    batch, beam, frames, labels = 20, 5, 30, 2
    rng = random.Random(1)
    tree = PrefixTree(batch=batch, beam=beam, frames=frames, blank_id=0, device=torch.device("cpu"))
    climbed: list[int] = []
    climb = tree._climb
    tree._climb = lambda nodes, steps: climbed.append(int(steps.max())) or climb(nodes, steps)  # type: ignore[method-assign]
    beams: list[Beam] = [[(), *[None] * (beam - 1)] for _ in range(batch)]
    for _ in range(frames):
        steps = [survive(b, rng, labels) for b in beams]
        beams = [new for new, _ in steps]
        source, label, grown, alive = (torch.tensor([[slot[i] for slot in slots] for _, slots in steps]) for i in range(4))
        tree.advance(Survivors(source=source, label=label, grown=grown, alive=alive))
        found, lengths = tree.labels(torch.arange(beam).repeat(batch, 1))
        for utt, slot in ((u, k) for u in range(batch) for k in range(beam)):
            prefix = beams[utt][slot]
            if prefix is None:
                assert tree.parent[utt, slot] == -1
                continue
            assert tuple(found[utt, slot, : int(lengths[utt, slot])].tolist()) == prefix
            assert int(tree.last[utt, slot]) == (prefix[-1] if prefix else 0)
            wanted = beams[utt].index(prefix[:-1]) if prefix and prefix[:-1] in beams[utt] else -1
            assert int(tree.parent[utt, slot]) == wanted
    assert max(climbed) >= 2, "the test must hold prefixes that come back far above those that begin with them"
