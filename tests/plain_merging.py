"""Rules that merge, restated in plain Python for one crop; written apart from the library."""

from __future__ import annotations

import math

Sums = dict[int, dict[int, float]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def by_visionzip(
    attention: list[float], keys: list[list[float]], keep: int, contextual: int
) -> tuple[set[int], Sums]:
    n = len(attention)
    best = sorted(range(n), key=lambda i: (-attention[i], i))[: keep - contextual]
    rest = [i for i in range(n) if i not in best]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    went: Sums = {t: {} for t in targets}
    for i in rest:
        if i not in targets:
            went[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))][i] = 0.0
    made = {t: {t: 1.0} | {i: 1 / len(members) for i in members} for t, members in went.items()}
    return set(best), made


def by_prumerge(
    attention: list[float], keys: list[list[float]], chosen: list[int], neighbours: int
) -> tuple[Sums, int | None]:
    n = len(attention)
    made: Sums = {}
    for i in chosen:
        others = sorted((j for j in range(n) if j != i), key=lambda j: -cosine(keys[i], keys[j]))
        made[i] = {i: 1.0} | {j: attention[j] for j in others[:neighbours]}
    rest = [j for j in range(n) if j not in chosen]
    if not rest:
        return made, None
    host = max(rest, key=lambda j: (attention[j], -j))
    made[host] = {j: attention[j] for j in rest}
    return made, host
