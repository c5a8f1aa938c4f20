"""A chat about a picture that shows beside each answer which visual tokens it was given from.

pip install gradio
python examples/chat.py                                   # the embedded model
python examples/chat.py --model llava-hf/llava-1.5-7b-hf --method divprune
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import gradio as gr
from transformers import TextIteratorStreamer

from vlmprune import Pruner, VlmpruneError, spec
from vlmprune.io import models, options, sources
from vlmprune.io.pictures import as_seen
from vlmprune.study import one_question

TOKENS = 256
History = list[dict[str, str]]
Shown = tuple[History, Any, str]


def pruner(method: str, keep: float) -> Pruner:
    """The method with its settings, and the slider's budget."""
    stages = spec.read(method)
    if not spec.fill(stages, "keep", keep):
        raise VlmpruneError(
            f"--method {method} leaves nothing to the slider; name a method that has a setting "
            "keep, such as vispruner, and leave keep out."
        )
    return spec.build(stages)


def answering(loaded: models.Loaded, method: str) -> Callable[..., Iterator[Shown]]:
    """What answers a question: word by word, and then with the picture of what was kept."""

    def answer(picture: Any, question: str, keep: float, history: History) -> Iterator[Shown]:
        if picture is None or not question.strip():
            raise gr.Error("Give a picture and a question.", print_exception=False)
        said = {"role": "assistant", "content": ""}
        history = [*history, {"role": "user", "content": question}, said]
        seen = as_seen(picture)
        inputs = models.prepare(loaded, [seen], question)
        words = TextIteratorStreamer(
            loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failed: list[Exception] = []

        def generate() -> None:
            try:
                loaded.model.generate(**inputs, max_new_tokens=TOKENS, streamer=words)
            except Exception as error:
                failed.append(error)
                words.end()

        # Gradio takes each step of this in a thread of its own, and a `with` block is for one.
        handle = pruner(method, keep / 100).attach(loaded.model)
        try:
            worker = Thread(target=generate)
            worker.start()
            for piece in words:
                said["content"] += piece
                yield history, None, ""
            worker.join()
        finally:
            handle.detach()
        if failed:
            raise gr.Error(str(failed[0]))
        report = handle.report
        told = f"{report.visual_tokens_after} of {report.visual_tokens_before} visual tokens"
        try:
            (kept,) = one_question.draw(loaded, inputs, [seen], report)
        # Of some families it is not known where visual tokens lie.
        except VlmpruneError as error:
            kept, told = None, f"{told}; {error}"
        yield history, kept, told

    return answer


def page(loaded: models.Loaded, label: str, method: str) -> gr.Blocks:
    """The page: the picture and the question, the answers, and what they were given from."""
    with gr.Blocks(title="vlmprune", analytics_enabled=False) as built:
        gr.Markdown(f"## {label}, pruned by {method}")
        with gr.Row():
            picture = gr.Image(type="pil", label="Picture", elem_id="picture")
            kept = gr.Image(
                format="png", label="Kept visual tokens", elem_id="kept", interactive=False
            )
        keep = gr.Slider(1, 100, 25, step=1, label="Visual tokens to keep, in per cent")
        told = gr.Textbox(label="The last answer was given from", elem_id="told")
        chat = gr.Chatbot(label="Answers", elem_id="chat")
        question = gr.Textbox(label="Question", elem_id="question", submit_btn=True)
        question.submit(
            answering(loaded, method), [picture, question, keep, chat], [chat, kept, told]
        )
    return built


def main() -> None:
    """Load the model, and serve the page on this machine."""
    asked = argparse.ArgumentParser(description="A chat that shows the visual tokens it keeps.")
    asked.add_argument("--model", help="a folder or an id of the Hub; by default the embedded one")
    asked.add_argument(
        "--method", default="vispruner", help="a method with a setting keep, and others"
    )
    asked.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    given = asked.parse_args()
    try:
        pruner(given.method, 0.25)
        source, place = sources.find_model(given.model), options.choose_device(None)
        loaded = models.load(source, place, options.choose_dtype(None, place))
    except VlmpruneError as error:
        raise SystemExit(f"vlmprune: {error}") from None
    page(loaded, source.label, given.method).launch(server_port=given.port)


if __name__ == "__main__":
    main()
