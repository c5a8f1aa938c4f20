"""The task of clips: what is asked, at which size, and that the processor is as it was."""

from __future__ import annotations

import pytest
from vlmprune.learned import MoD

from vlmprune import UniformGrid, embedded
from vlmprune.io.models import Loaded
from vlmprune.io.processors import scaled
from vlmprune.study.evals.run import evaluate
from vlmprune.study.tasks import Clips, find_task


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*embedded.load())


def test_sixty_clips_of_four_frames() -> None:
    task = find_task("clips")
    assert task == Clips()
    samples = task.samples()
    assert len(samples) == 428 and len({one.group for one in samples}) == 60
    frames = samples[0].opened()
    assert [one.size for one in frames] == [(112, 112)] * 4
    assert task.score(samples[0], samples[0].answers[0]) == 1
    assert task.score(samples[0], "a cat.") == 0


def test_frames_are_fed_small_and_the_processor_is_as_it_was(loaded: Loaded) -> None:
    before = loaded.processor.image_processor.size
    found = evaluate(loaded, UniformGrid(keep=0.25), Clips(), limit=1)
    assert found.results[0].visual_tokens_before == 4 * 64
    assert found.results[0].visual_tokens == 4 * 16
    assert loaded.processor.image_processor.size is before
    with pytest.raises(RuntimeError), scaled(loaded.processor, 56):
        assert loaded.processor.image_processor.size["height"] == 56
        raise RuntimeError
    assert loaded.processor.image_processor.size is before
    with scaled(loaded.processor, None):
        assert loaded.processor.image_processor.size is before


def test_what_skips_layers_was_trained_on_clips(loaded: Loaded) -> None:
    """The first clips answered by MoD and by the model that knows single pictures alone."""
    mod = evaluate(loaded, MoD(weights="embedded-mod"), Clips(), limit=16)
    plain = evaluate(loaded, None, Clips(), limit=16)
    assert mod.mean.value >= plain.mean.value + 0.2
    layers = mod.results[0].kv_bytes / mod.results[0].kv_bytes_before
    # Two layers of five keep a fifth of each frame's 64 tokens.
    assert layers == pytest.approx((3 * 64 + 2 * 13) / (5 * 64), abs=0.01)
