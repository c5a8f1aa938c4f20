"""`vlmprune run`: one question, with and without pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import (
    AsJson,
    Budget,
    Device,
    Dtype,
    Force,
    Fraction,
    Keep,
    Model,
    Newlines,
    Text,
    keep_of,
)
from vlmprune.cli.printing import bare_table, console, notes, print_json, progress
from vlmprune.costs.units import change, flops, mib, percent
from vlmprune.errors import VlmpruneError, reason
from vlmprune.files import is_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmprune.report import Reading
    from vlmprune.study.one_question import BothWays, OneWay


def run(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="One or more pictures.", show_default=False)
    ],
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="What to ask about them.",
            show_default=False,
            # Before a missing picture is told of, which it is where a picture stands in its place.
            is_eager=True,
            callback=lambda text: _check_question(text),
        ),
    ],
    model: Model = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="A method with its settings, as vispruner:important_ratio=0.75; chain several "
            "by + (or by | in quotes). See `vlmprune methods`.",
        ),
    ] = "vispruner",
    keep: Keep = None,
    important_ratio: Annotated[
        Fraction, typer.Option(help="Share of them taken by attention; the rest is diverse.")
    ] = None,
    positions: Annotated[
        Text,
        typer.Option(help='"compact" renumbers, "original" keeps gaps, "auto" as the model wants.'),
    ] = None,
    budget: Budget = None,
    newlines: Newlines = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens over which decoding is timed, whatever the answer; 0: none.")
    ] = 32,
    repeat: Annotated[int, typer.Option(help="Timed rounds, of which the medians count.")] = 3,
    device: Device = None,
    dtype: Dtype = None,
    save_overlay: Annotated[
        Text, typer.Option(metavar="FILE", help="Draw the kept tokens on the picture.")
    ] = None,
    save_recall: Annotated[
        Text,
        typer.Option(
            metavar="FILE",
            help="Draw what each step of a method such as recall reads, word by word: a .gif or "
            ".webp that moves, or a .png of stills.",
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about pictures, with and without pruning."""
    _check_images(images)
    with progress("Starting…") as say:
        from vlmprune import spec
        from vlmprune.draw.recall import ENDINGS
        from vlmprune.io import models, options, outputs, sources
        from vlmprune.io.pictures import open_images
        from vlmprune.study import one_question, word_by_word

        with models.quiet():
            options.check_pictures(spec.read(method))
            pruner = options.make_pruner(
                method,
                {
                    "keep": None if keep is None else keep_of(keep),
                    "important_ratio": important_ratio,
                    "positions": positions,
                    "budget": budget,
                    "newlines": newlines,
                },
            )
            options.at_least_one(max_new_tokens=max_new_tokens, repeat=repeat)
            options.check_decode(decode_tokens)
            if save_recall:
                word_by_word.check(pruner, "--save-recall", max_new_tokens)
                # So that the answer is the one that is drawn.
                pruner = word_by_word.in_part(pruner)
            pictures = open_images(images)
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            targets = outputs.overlay_names(save_overlay, images) if save_overlay else []
            films = []
            if save_recall:
                film = outputs.named(save_recall, "--save-recall", *ENDINGS)
                films = outputs.numbered(film, len(images))
            files, film_files = (
                [outputs.Output(path, outputs.mark_of("run"), force) for path in paths]
                for paths in (targets, films)
            )
            outputs.claim([*files, *film_files], images)
            say(f"Loading {source.label}…")
            loaded = models.load(source, place, kind)
            inputs = models.prepare(loaded, pictures, question)
            undrawn = one_question.undrawn(loaded) if targets or films else ""
            if undrawn:
                _tell_undrawn(undrawn)
                targets, films = [], []
            outcome = one_question.answer_twice(
                loaded, pruner, inputs, max_new_tokens, repeat, decode_tokens, say
            )
            drawn, followed = [], None
            try:
                if targets:
                    say("Drawing…")
                    drawn = one_question.draw(loaded, inputs, pictures, outcome.report)
                if films:
                    say("Following the answer word by word…")
                    # In a call of its own, since noting what is read takes time.
                    followed = word_by_word.follow(loaded, pruner, inputs, pictures, max_new_tokens)
            except VlmpruneError as error:
                # The answer is there, and is what was asked for first.
                undrawn = reason(error)
                _tell_undrawn(undrawn)
                targets, films, drawn, followed = [], [], [], None
            for file, picture in zip(files, drawn, strict=False):
                file.write_picture(picture)
            if followed is not None:
                for number, (file, picture) in enumerate(zip(film_files, pictures, strict=True)):
                    frames, durations = followed.pictures(number, picture, file.path.suffix.lower())
                    file.write_picture(frames[0], frames[1:], durations)
    if as_json:
        about: dict[str, Any] = {"model": source.name, "method": spec.dump(pruner)}
        about |= {"images": images, "question": question}
        made: dict[str, Any] = {"overlays": list(map(str, targets))}
        made |= {"films": list(map(str, films)), "not_drawn": undrawn or None}
        print_json(about | outcome.as_dict() | made)
        return
    names = " + ".join(stage.name for stage in spec.read(method))
    _print_outcome(source.label, names, question, outcome)
    for path in targets:
        console().print(f"kept tokens drawn in {path}", markup=False, soft_wrap=True)
    for path in films:
        console().print(f"what each step reads drawn in {path}", markup=False, soft_wrap=True)


def _tell_undrawn(why: str) -> None:
    """Say that there is an answer and nothing to see."""
    typer.echo(f"vlmprune: nothing is drawn ({why}); the answer comes without.", err=True)


def _check_question(question: str) -> str:
    """Refuse what is no question: nothing, a file, or a word such as photo.jpg."""
    from pathlib import Path

    from vlmprune.io.pictures import SUFFIXES

    try:
        known = is_file(question)
    # What may not be looked at is nothing to look for: a question may be any text.
    except VlmpruneError:
        known = False
    one_word = len(question.split()) == 1
    if known or not question.strip() or (one_word and Path(question).suffix.lower() in SUFFIXES):
        raise VlmpruneError(
            'the question is missing; give it last, as in: vlmprune run photo.jpg "What is this?"'
        )
    if not question.isprintable() and any("\ud800" <= one <= "\udfff" for one in question):
        raise VlmpruneError(
            f"the question {question!r} holds bytes that are no text in this terminal's encoding; "
            "write it in that."
        )
    return question


def _check_images(images: list[str]) -> None:
    """Refuse what is no file, as words of a question without quotes, before anything slow."""
    from pathlib import Path

    from vlmprune.io.pictures import SUFFIXES, check_file

    for number, image in enumerate(images):
        try:
            check_file(image)
        except VlmpruneError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            if not number or not missing or Path(image).suffix.lower() in SUFFIXES:
                raise
            raise VlmpruneError(
                f"image {image!r} does not exist; if it is a word of the question, put that in "
                'quotes, as in: vlmprune run photo.jpg "What is this?"'
            ) from error


def _print_outcome(model: str, method: str, question: str, outcome: BothWays) -> None:
    from rich.text import Text

    full, pruned, report = outcome.full, outcome.pruned, outcome.report
    table = bare_table("all tokens", method)
    table.add_column("", style="green", justify="right", no_wrap=True)

    def row(name: str, show: Callable[[OneWay], str], change: str) -> None:
        table.add_row(name, Text(show(full)), Text(show(pruned)), change)

    def saved(name: str) -> str:
        return change(getattr(full, name), getattr(pruned, name))

    row("answer", lambda m: m.answer, "same" if full.answer == pruned.answer else "differs")
    row("visual tokens", lambda m: str(m.visual_tokens), saved("visual_tokens"))
    faster = f"{outcome.first_token_speedup:.2f}x"
    row("first token", lambda m: f"{m.first_token_ms:.1f} ms", faster)
    decode = outcome.decode_speedup
    row("decode", _rate, "" if decode is None else f"{decode:.2f}x")
    row("total", lambda m: f"{m.total_ms:.1f} ms", f"{outcome.total_speedup:.2f}x")
    row("visual KV", lambda m: f"{mib(m.kv_bytes)} MiB", saved("kv_bytes"))
    reading = report.reading
    if reading is not None:
        if reading.host_bytes:
            row("in host memory", lambda m: f"{mib(m.kv_bytes_host)} MiB", "")
        row("read by a step", lambda m: f"{mib(m.kv_bytes_read)} MiB", saved("kv_bytes_read"))
    row("LLM FLOPs", lambda m: f"{flops(m.decoder_flops)}FLOPs", saved("decoder_flops"))
    row("with encoder", lambda m: f"{flops(m.flops)}FLOPs", saved("flops"))

    out = console()
    out.print(Text.assemble((question, "bold"), (f"  ({model})", "dim")))
    out.print()
    out.print(table)
    out.print()
    same = "the same as" if outcome.first_token_same else "not"
    score = f"{report.score}; " if report.score else ""
    lines = [
        f"the answer's first token: {same} the unpruned model's",
        f"{report.positions} positions; {score}selected in "
        f"{1000 * report.seconds_selecting:.1f} ms",
        f"first token: from the call to it, encoder included; {outcome.device}, {outcome.dtype}, "
        f"median of {outcome.repeat}",
        "visual KV, FLOPs: of the visual tokens",
    ]
    if outcome.decode_tokens:
        lines.insert(3, f"decode: over {outcome.decode_tokens} tokens either way")
    if report.below_words:
        lines.append(report.below_words)
    rates = [rate for layer in report.cut for rate in layer.retention if rate is not None]
    if rates:
        lines.append(
            f"{len(report.cut)} layers' caches cut, to {percent(min(rates))} to "
            f"{percent(max(rates))} of their visual tokens"
        )
    if reading is not None:
        lines += _read(reading)
    notes(lines)


def _read(reading: Reading) -> list[str]:
    """What a cache holds that is read in part, and what its steps read."""
    most = max(one for row in reading.read for one in row)
    lines = list[str]()
    if reading.aside:
        lines.append(
            f"{reading.aside} layers read in whole, which is faster here; else always=true"
        )
    if part := len(reading.layers) - reading.aside:
        lines.append(f"{part} layers read in part: a picture's {most} best tokens a KV head")
        lines.append("held and read: with the sketches that tokens are chosen by")
    if reading.share_read is None:
        lines.append("the answer took no step after its first token, which reads everything")
    if reading.host_bytes and reading.share_fetched is not None:
        lines.append(f"a step fetches {percent(reading.share_fetched, '.1f')} from host memory")
    if reading.share_of_attention is not None:
        share = percent(reading.share_of_attention)
        lines.append(f"{share} of these layers' attention fell on what was read, text included")
    return lines


def _rate(measured: OneWay) -> str:
    speed = measured.decode_tokens_per_second
    return "–" if speed is None else f"{speed:.0f} tok/s"  # noqa: RUF001 - a dash, as tables have
