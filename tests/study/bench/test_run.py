"""What `bench` measures, on which work, and in which order. No time is asserted."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import model, request
from vlmprune import PLPHP, VisPruner
from vlmprune.errors import VlmpruneError
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import workload
from vlmprune.study.bench.results import BenchResult, Quartiles

CPU = torch.device("cpu")
# Bytes of a tiny model's token in the cache: keys and values, 3 layers, 2 heads of 8, four bytes.
TOKEN = 2 * 3 * 2 * 8 * 4


def tiny_work(images: list[int]) -> workload.Work:
    built = model("llava")
    return workload.Work(built, request(built, images).inputs, "tiny", images[0])


@pytest.fixture(scope="module")
def compared() -> BenchResult:
    pruners = {"few": VisPruner(4), "all": VisPruner(1.0), "cut": PLPHP(r=0.5, dr=0)}
    return bench.compare(tiny_work([1, 1]), pruners, new_tokens=3, repeat=4)


def test_what_was_counted(compared: BenchResult) -> None:
    full, (few, whole, cut) = compared.full, compared.methods
    assert (compared.batch, compared.new_tokens, compared.repeat) == (2, 3, 4)
    assert [one.name for one in compared.methods] == ["few", "all", "cut"]
    # Two rows of 16 visual tokens, of which a method keeps 4 a row, all, or half a head's.
    assert [one.visual_tokens for one in (full, few, whole, cut)] == [32, 8, 32, 32]
    assert [one.visual_kv_bytes for one in (full, few, whole, cut)] == [
        TOKEN * n for n in (32, 8, 32, 16)
    ]
    # What is stored besides are texts, padding and what was decoded: the same either way.
    assert full.cache_bytes - few.cache_bytes == TOKEN * 24
    assert full.cache_bytes == whole.cache_bytes == TOKEN * 2 * (compared.prompt_tokens + 2)
    assert full.flops == whole.flops > few.flops
    assert len(full.first_tokens) == 2
    assert full.peak_bytes is None


def test_ways_against_all_tokens(compared: BenchResult) -> None:
    full, (few, whole, cut) = compared.full, compared.methods
    # Nothing dropped, or dropped after prefill, changes no first token.
    for one in (whole, cut):
        assert one.first_tokens == full.first_tokens
        assert one.against(full)["same_first_tokens"] == 2
    against = few.against(full)
    assert against["visual_kv_ratio"] == 4
    assert against["flops_ratio"] == full.flops / few.flops
    assert against["first_token_speedup"] == full.first_ms.median / few.first_ms.median
    assert full.prefill_ms is not None and few.prefill_ms is not None
    assert against["prefill_speedup"] == full.prefill_ms.median / few.prefill_ms.median
    assert few.selecting_ms is not None
    assert against["selecting_share"] == few.selecting_ms.median / full.first_ms.median
    assert against["peak_ratio"] is None
    myself = full.against(full)
    assert all(value in (1, 2, None) for value in myself.values())


def test_every_way_is_measured_in_every_turn(compared: BenchResult) -> None:
    for one in (compared.full, *compared.methods):
        assert one.decode_tokens_per_second is not None and one.prefill_ms is not None
        for spread in (one.first_ms, one.prefill_ms, one.decode_tokens_per_second, one.total_ms):
            assert len(spread.values) == 4
            assert min(spread.values) > 0
        for first, total in zip(one.first_ms.values, one.total_ms.values, strict=True):
            assert first < total
    assert compared.full.selecting_ms is None
    for one in compared.methods:
        assert one.selecting_ms is not None and len(one.selecting_ms.values) == 4


def test_all_ways_take_the_lead_in_turn() -> None:
    built = tiny_work([1])
    said: list[str] = []
    ways = {"a": VisPruner(4), "b": VisPruner(8)}
    bench.compare(built, ways, new_tokens=1, repeat=3, say=said.append)
    assert said[:3] == ["Warming up: a…", "Warming up: b…", "Warming up: all tokens…"]
    turns = [line.partition(": ")[2].rstrip("…") for line in said[3:]]
    rounds = [turns[i : i + 3] for i in (0, 3, 6)]
    assert [one[0] for one in rounds] == ["a", "b", "all tokens"]
    assert all(sorted(one) == ["a", "all tokens", "b"] for one in rounds)


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_light_warm_up(repeat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens and the floors are called once less; what is told is the same."""
    built, pruners = tiny_work([1]), {"few": VisPruner(4), "cut": PLPHP(r=0.5, dr=0)}
    calls: list[int] = []
    timed = bench.timed

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return timed(*given, **named)

    monkeypatch.setattr(bench, "timed", counted)
    given: Any = {"new_tokens": 2, "repeat": repeat, "floor": True}
    whole = bench.compare(built, pruners, **given)
    # All tokens, two methods, and the floor of each.
    assert len(calls) == 5 * (1 + repeat)
    calls.clear()
    said: list[str] = []
    light = bench.compare(built, pruners, **given, light=True, say=said.append)
    assert len(calls) == len(said) == 2 + 5 * repeat
    assert said[:3] == ["Warming up: few…", "Warming up: cut…", f"Turn 1 of {repeat}: all tokens…"]
    assert len(set(said)) == len(said)
    times = ("first_ms", "prefill_ms", "selecting_ms", "total_ms", "decode_tokens_per_second")
    for one, other in zip(
        (whole.full, *whole.methods, *whole.floors),
        (light.full, *light.methods, *light.floors),
        strict=True,
    ):
        for name in times:
            spread, found = getattr(one, name), getattr(other, name)
            assert (
                (spread is None)
                == (found is None)
                == (name == "selecting_ms" and one not in whole.methods)
            )
            assert found is None or len(found.values) == repeat
        untimed = dict.fromkeys(times)
        assert replace(one, **untimed) == replace(other, **untimed)
    with pytest.raises(ValueError, match="light=True"):
        bench.compare(built, pruners, 1, 1, light=True, memory=True)


def test_the_model_is_given_back() -> None:
    built = tiny_work([1])
    before = set(vars(built.model))
    with pytest.raises(VlmpruneError, match="budget='clip' is for videos"):
        bench.compare(built, {"none": VisPruner(4, budget="clip")}, new_tokens=1, repeat=1)
    assert set(vars(built.model)) == before


def test_one_new_token_has_no_decode_speed() -> None:
    result = bench.compare(tiny_work([1]), {"few": VisPruner(4)}, new_tokens=1, repeat=1)
    assert result.full.decode_tokens_per_second is None
    assert result.methods[0].against(result.full)["decode_speedup"] is None


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_spread(values: list[float]) -> None:
    spread = Quartiles.of(values)
    assert spread is not None
    assert spread.median == pytest.approx(statistics.median(values))
    room = 1e-9 * max(values)
    assert min(values) - room <= spread.low <= spread.median + room
    assert spread.median - room <= spread.high <= max(values) + room
    assert spread.values == tuple(values) and spread.share >= 0


def test_no_spread_of_nothing() -> None:
    assert Quartiles.of([]) is None
    assert Quartiles.of([2.0]) == Quartiles(2.0, 2.0, 2.0, (2.0,))


def test_peaks_are_measured_where_they_are_asked_for() -> None:
    ways = {"few": VisPruner(4)}
    result = bench.compare(tiny_work([2, 2]), ways, 2, 1, floor=True, memory=True)
    full, few = result.full, result.methods[0]
    assert full.peak_bytes is not None and few.peak_bytes is not None
    assert full.peak_bytes > few.peak_bytes >= few.cache_bytes
    assert few.against(full)["peak_ratio"] == full.peak_bytes / few.peak_bytes
    assert all(one.peak_bytes for one in result.floors)
