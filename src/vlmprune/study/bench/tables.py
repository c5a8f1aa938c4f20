"""`bench`'s figures as Markdown, and what the terminal shows of them: read from its JSON alone.

Times are absolute on a GPU only. On a CPU they depend on what else the machine does, so ratios
alone are shown; the JSON has all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.costs.units import change, flops, known, mib, percent
from vlmprune.study.bench.results import Quartiles
from vlmprune.study.markdown import table

Content = Mapping[str, Any]
DASH = "–"  # noqa: RUF001 - a dash, as tables have

LEGEND = (
    "first token: from the call to the first token, encoder and selection included; prefill: the "
    "language model's layers on the prompt; total: the whole call",
    "x floor: the time to the first token as a multiple of that of the same model given a natively "
    "short prompt of as many visual tokens, the encoder's work included; then the time of a decode "
    "step as a multiple of that with a cache as short as the method's",
    "selecting: what choosing takes of the unpruned time to the first token",
    "visual KV, FLOPs: of the visual tokens, by the published formulas; of a cache that is read in "
    "part what lies on the device, sketches included, and what a decode step reads",
)


def on_gpu(content: Content) -> bool:
    """Whether times may be shown."""
    return "CPU" not in str(content["seconds_are"])


def title(run: Content) -> str:
    """What a run was about."""
    visual = run["all_tokens"]["visual_tokens"] // run["batch"]
    return (
        f"batch {run['batch']}, {visual} visual tokens ({run['images']} picture(s)) in a prompt of "
        f"{run['prompt_tokens']}, {run['new_tokens']} new tokens"
    )


def setting(content: Content) -> str:
    """Hardware, versions, precision and repeats."""
    run, versions = content["runs"][0], content["versions"]
    threads = "" if on_gpu(content) else f", {content['threads']} thread(s)"
    return (
        f"{content['device_name']}{threads}, {run['dtype']}, attention "
        f"{content.get('attention') or 'unknown'}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, vlmprune {versions['vlmprune']}; medians of "
        f"{run['repeat']} turn(s)"
    )


def headings(content: Content) -> list[str]:
    """Of the table's columns."""
    names = ["", "visual tokens", "first token", "prefill", "decode", "total"]
    names += ["x floor (first token, decode)", "selecting", "visual KV"]
    if any(run["all_tokens"]["peak_bytes"] is not None for run in content["runs"]):
        names.append("peak")
    return [*names, "FLOPs"]


def rows(content: Content, run: Content) -> list[list[str]]:
    """All tokens, the methods and the floors, a line each."""
    return [
        _row(content, run, one)
        for one in (run["all_tokens"], *run["methods"], *run.get("floors", ()))
    ]


def markdown(content: Content, with_legend: bool = True) -> str:
    """A table for each run, and what the figures depend on.

    Args:
        content: what `vlmprune bench --out` writes.
        with_legend: say what the columns are.
    """
    parts = [f"**{content['runs'][0]['model']}**; {setting(content)}."]
    for run in content["runs"]:
        made = table(headings(content), rows(content, run))
        lines = [f"{title(run)[0].upper()}{title(run)[1:]}:", "", made]
        if run.get("no_floor"):
            lines += ["", f"No floor: {run['no_floor']}"]
        parts.append("\n".join(lines))
    if with_legend:
        parts.append(legend(content))
    parts.append(f"```\n{content['command']}\n```")
    return "\n\n".join(parts) + "\n"


def legend(content: Content) -> str:
    """What the columns are, as a list."""
    how = "speeds as multiples of that with all tokens"
    if on_gpu(content):
        how = "times, and in brackets how many times faster than with all tokens"
    around = f"{how}; ± half the distance between the quartiles"
    return "\n".join(f"- {line}." for line in (around, *LEGEND, _peak(content)))


def _peak(content: Content) -> str:
    if any(run["all_tokens"]["peak_bytes"] is not None for run in content["runs"]):
        how = "by CUDA's allocator" if on_gpu(content) else "tensors alone, by torch's profiler"
        return f"peak: the most memory a call holds beyond weights and inputs, {how}"
    return "peak memory: not measured; on a CPU it takes `--memory`"


def _row(content: Content, run: Content, one: Content) -> list[str]:
    gpu, full = on_gpu(content), run["all_tokens"]
    against: Content = one.get("against_all_tokens") or {}
    floor: Content = one.get("times_the_floor") or {}

    def time(name: str, ratio: str, unit: str = "ms") -> str:
        return measured(one[name], against.get(ratio), gpu, unit)

    share = against.get("selecting_share")
    times = [factor(floor.get(name)) for name in ("first_token", "decode")]
    cells = [
        one["name"],
        str(one["visual_tokens"]),
        time("first_ms", "first_token_speedup"),
        time("prefill_ms", "prefill_speedup"),
        time("decode_tokens_per_second", "decode_speedup", "tok/s"),
        time("total_ms", "total_speedup"),
        ", ".join(cell or DASH for cell in times) if any(times) else "",
        selecting(share),
        _kv(one, full),
    ]
    if "peak" in headings(content):
        cells.append(part(one["peak_bytes"], full["peak_bytes"]))
    spent, whole = known(one["flops"]), known(full["flops"])
    return [*cells, f"{flops(spent)}{_saved(spent, whole)}".strip()]


def measured(quartiles: Content | None, speedup: float | None, absolute: bool, unit: str) -> str:
    """A median with its quartiles' distance; where times say nothing, the speed-up instead."""
    if quartiles is None:
        return DASH
    found = Quartiles(**quartiles)
    if not absolute:
        return f"{factor(speedup or 1)}x{spread(found)}"
    return timed(found, unit) + ("" if speedup is None else f" ({factor(speedup)}x)")


def timed(quartiles: Quartiles | None, unit: str = "ms") -> str:
    """A median with its quartiles' distance; a dash for what was not measured."""
    return DASH if quartiles is None else f"{quartiles.median:.1f} {unit}{spread(quartiles)}"


def spread(quartiles: Quartiles) -> str:
    """Half the distance between the quartiles, as it stands behind a median; "" of one turn."""
    return f" ±{percent(quartiles.share)}" if len(quartiles.values) > 1 else ""


def selecting(share: float | None) -> str:
    """What choosing takes; nothing where nothing is chosen."""
    return "" if share is None else percent(share, ".2g")


def factor(value: float | None) -> str:
    """A ratio with two digits behind the point."""
    return "" if value is None else f"{value:.2f}"


def part(size: float | None, full: float | None) -> str:
    """Bytes, and what is saved of them."""
    if size is None:
        return DASH
    return f"{mib(size)} MiB{_saved(size, full or size)}"


def _kv(one: Content, full: Content) -> str:
    """Bytes held for visual tokens; also those on the host, and what a step reads of all."""
    held, read = one["visual_kv_bytes"], one.get("visual_read_bytes")
    whole = known(full["visual_kv_bytes"])
    said = part(known(held), whole)
    if one.get("visual_host_bytes"):
        said += f", {mib(one['visual_host_bytes'])} MiB on the host"
    if read is not None and read != held:
        said += f", {part(read, whole)} read"
    return said


def _saved(value: float, full: float) -> str:
    found = change(full, value)
    return f" ({found})" if found else ""
