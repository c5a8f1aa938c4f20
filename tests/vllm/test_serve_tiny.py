"""A pruning server whose steps take 48 tokens at most, so that prompts and images are cut up.

LLaVA-1.5 of random weights; kept tokens have compact positions.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import IMAGE, VISUAL
from client import Asked, ask
from recorded import records
from reference import Reference, difference
from serving import Server

from vlmprune import VisPruner

TEXT = "where is the cat?"
KEEP, STEP = 16, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(serve, tiny: Path, folder: Path) -> Server:
    """In vLLM's usual processes: the server, its engine and a worker."""
    changes = {"VLMPRUNE": f"vispruner:keep={KEEP}", "VLMPRUNE_VLLM_RECORD": str(folder)}
    arguments = (
        f"--max-num-batched-tokens={STEP}",
        "--max-model-len=512",
        "--enable-logging-iteration-details",
    )
    return serve(tiny, changes, arguments)


@pytest.mark.parametrize(
    ("keep", "left"), [(None, KEEP), (40, 40), (0.25, 16), (1, 1), (500, VISUAL), ("all", VISUAL)]
)
def test_prompts_hold_the_kept_tokens_alone(
    server: Server, tiny_reference: Reference, pictures, keep, left: int
) -> None:
    asked = Asked(TEXT, (pictures[0],), keep, tokens=12)
    got = ask(server, asked)
    assert got.status == 200, got.error
    method = VisPruner(keep=left) if left < VISUAL else None
    expected = tiny_reference(asked, method)
    assert got.prompt.count(IMAGE) == left
    assert got.prompt_tokens == len(got.prompt) == expected.prompt_tokens
    assert list(got.ids) == expected.ids
    assert difference(got, expected) < 1e-4


def test_pruning_shows(server: Server, tiny_reference: Reference, pictures) -> None:
    """Control: the comparison above tells a pruned answer from an unpruned one."""
    asked = Asked(TEXT, (pictures[0],), tokens=12)
    assert difference(ask(server, asked), tiny_reference(asked)) > 1e-3


def test_several_images_each_have_the_budget(
    server: Server, tiny_reference: Reference, pictures
) -> None:
    asked = Asked(TEXT, tuple(pictures[:3]), 20, tokens=12)
    got, expected = ask(server, asked), tiny_reference(asked, VisPruner(keep=20))
    assert got.prompt.count(IMAGE) == 60
    assert got.prompt_tokens == expected.prompt_tokens
    assert list(got.ids) == expected.ids
    assert difference(got, expected) < 1e-4


def test_kept_tokens_are_those_of_transformers(
    server: Server, folder: Path, tiny_reference: Reference, pictures
) -> None:
    kept = []
    for picture in pictures[:4]:
        asked = Asked(TEXT, (picture,), 24, tokens=1)
        assert ask(server, asked).status == 200
        expected = tiny_reference(asked, VisPruner(keep=24))
        found = [one for one in records(folder, expected.pixels) if len(one["kept"]) == 24]
        assert found
        assert all(one["before"] == VISUAL for one in found)
        assert all(one["kept"] == expected.kept[0] for one in found)
        kept.append(expected.kept[0])
    # Control: another image keeps others.
    assert all(one != kept[0] for one in kept[1:])


def test_requests_without_images_are_unchanged(server: Server, tiny_reference: Reference) -> None:
    asked = Asked("what is in row two column three?", tokens=12)
    got, expected = ask(server, asked), tiny_reference(asked)
    assert got.prompt_tokens == expected.prompt_tokens
    assert list(got.ids) == expected.ids
    assert difference(got, expected) < 1e-4


@pytest.mark.parametrize("keep", [0, -3, 1.5, 0.0, "many", "", [16], {"a": 1}, True])
def test_a_wrong_budget_is_refused_in_a_sentence(server: Server, pictures, keep) -> None:
    got = ask(server, Asked(TEXT, (pictures[0],), keep))
    assert got.status == 400
    assert "vlmprune_keep" in got.error
    assert "Traceback" not in got.error
    assert "\n" not in got.error.strip()
    # The server goes on.
    assert ask(server, Asked(TEXT, (pictures[0],), 16)).status == 200


def test_images_were_cut(server: Server, tiny_reference: Reference, pictures) -> None:
    """No step held the 64 tokens of an image: the server's own log of its steps."""
    asked = Asked(TEXT, tuple(pictures[4:6]), "all", 12, {"cache_salt": "its own prefixes"})
    got, expected = ask(server, asked), tiny_reference(asked)
    assert list(got.ids) == expected.ids
    line = re.compile(r"Iteration\(\d+\): \d+ context requests, (\d+) context tokens, ")
    tokens = [int(found) for found in line.findall(server.log.read_text(errors="replace"))]
    assert max(tokens) == STEP < VISUAL
    assert tokens.count(STEP) >= 2
