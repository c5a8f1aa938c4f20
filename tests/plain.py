"""Rules that drop rows, restated in plain Python for one sample; written apart from the library."""

from __future__ import annotations

import math

Vectors = list[list[float]]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def best(scores: list[float], among: list[int], count: int) -> list[int]:
    """Places of the largest scores, ties to the lower one."""
    return sorted(among, key=lambda i: (-scores[i], i))[:count]


def of_image(images: list[int], image: int) -> list[int]:
    return [i for i, one in enumerate(images) if one == image]


def raters(visual: Vectors, words: Vectors) -> list[bool]:
    """SparseVLM's: whether a word's mean softmax weight is above the average."""
    mean = [0.0] * len(words)
    for v in visual:
        dots = [sum(x * y for x, y in zip(v, w, strict=True)) for w in words]
        powers = [math.exp(d - max(dots)) for d in dots]
        mean = [m + p / sum(powers) / len(visual) for m, p in zip(mean, powers, strict=True)]
    return [m > sum(mean) / len(mean) for m in mean]


def clustered(vectors: Vectors, count: int) -> list[list[int]]:
    """Density peaks: members of each cluster, by falling worth of the centre."""
    n = len(vectors)
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in vectors] for a in vectors]
    dense = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    top = max(map(max, far))
    worth = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (dense[j], -j) > (dense[i], -i)]
        worth.append(min(denser, default=top) * dense[i])
    centres = best(worth, list(range(n)), count)
    member = [i if i in centres else min(centres, key=lambda c: (far[i][c], c)) for i in range(n)]
    return [[i for i in range(n) if member[i] == c] for c in centres]


def recycled(vectors: Vectors, scores: list[float], dropped: list[int], part: float) -> Vectors:
    """SparseVLM's merged rows of an image, in order."""
    if not dropped:
        return []
    chosen = sorted(best(scores, dropped, math.floor(len(dropped) * part) + 1))
    groups = clustered([vectors[i] for i in chosen], len(chosen) // 10 + 1)
    return [
        [sum(vectors[chosen[i]][d] for i in group) / len(group) for d in range(len(vectors[0]))]
        for group in groups
    ]


def unlike(
    vectors: Vectors, norms: list[float], words: Vectors, word_norms: list[float], keep: int
) -> list[int]:
    """DART's choice in one image, with 4 and 4 pivots."""
    everything = list(range(len(vectors)))
    pivots = sorted(best(norms, everything, min(4, keep)))
    asking = sorted(best(word_norms, list(range(len(words))), 4))
    kept = set(pivots)
    takers = [vectors[i] for i in pivots] + [words[i] for i in asking]
    rest = keep - len(pivots)
    for turn, taker in enumerate(takers):
        share = rest // len(takers) + (turn < rest % len(takers))
        left = [i for i in everything if i not in kept]
        unlikeness = [-cosine(taker, vector) for vector in vectors]
        kept |= set(best(unlikeness, left, share))
    return sorted(kept)


def tiled(rows: int, columns: int, side: int) -> list[list[tuple[int, int]]]:
    """Of each window (place within it, cell), row by row."""
    out = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            out.append([
                ((r - top) * side + c - left, r * columns + c)
                for r in range(top, min(top + side, rows))
                for c in range(left, min(left + side, columns))
            ])  # fmt: skip
    return out
