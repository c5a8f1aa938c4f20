"""Keep what the vision encoder makes of a picture, for every method that reads the same of it.

Only requests of one picture are kept, as `vlmprune.study.evals.run` encodes them, and none in whose
encoder a method acts. Choosing, merging and all that comes after still runs for each method.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vlmprune.runtime.call import choose
from vlmprune.runtime.encoder import encode
from vlmprune.views import Reads


@contextmanager
def encoded_once() -> Iterator[None]:
    """Remember encodings inside a `with` block: the plain ones, and those by the latest reads."""
    original = choose.encode
    form = inspect.signature(original)
    kept: dict[str, dict[bytes, encode.Encoded]] = {}
    depths: list[tuple[int, int]] = []

    def remembering(*args: Any, **kwargs: Any) -> encode.Encoded:
        given = form.bind(*args, **kwargs)
        given.apply_defaults()
        one = given.arguments
        geometry, asked = one["geometry"], one["asked"]
        if len(geometry.items) != 1 or any(one["acts"]):
            return original(*args, **kwargs)

        def noting(depth: int, feature: int) -> Reads:
            depths[:] = [(depth, feature)]
            return asked(depth, feature)

        one["asked"] = noting
        if not depths:
            return original(*given.args, **given.kwargs)
        by, usual = (repr((reads, one["score"])) for reads in (asked(*depths[0]), Reads()))
        for other in set(kept) - {by, usual}:
            del kept[other]
        medium = geometry.items[0].medium
        pixels = one["inputs"][medium][one["media"][medium].inputs[0]]
        picture = hashlib.blake2b(pixels.cpu().numpy().tobytes()).digest()
        pictures = kept.setdefault(by, {})
        if picture not in pictures:
            found = original(*given.args, **given.kwargs)
            for output in found.outputs.values():
                # Of all layers, and looked at no more.
                if getattr(output, "hidden_states", None) is not None:
                    output.hidden_states = None
            pictures[picture] = found
        return replace(pictures[picture])

    choose.encode = remembering
    try:
        yield
    finally:
        choose.encode = original
