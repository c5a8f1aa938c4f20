"""The embedded model: loads offline as stock LLaVA, answers rightly, and only because it looks."""

import json
import logging

import pytest
import torch
import transformers
from PIL import Image

from vlmprune import embedded


@pytest.fixture(scope="module")
def loaded():
    return embedded.load()


@pytest.fixture(scope="module")
def listed():
    return json.loads((embedded.scenes() / "scenes.json").read_text())


def answer(loaded, picture, question):
    model, processor = loaded
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(text=text, images=picture, return_tensors="pt")
    out = model.generate(**inputs)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_at_most_60_megabytes_and_4_for_what_a_method_learned():
    home = embedded.path().parent
    files = [f for f in home.rglob("*") if f.suffix != ".pyc" and f.is_file()]
    learned = [f for f in files if home / "learned" in f.parents]
    assert sum(f.stat().st_size for f in files if f not in learned) <= 60e6
    folders = {f.parent for f in learned}
    assert len(folders) == 7
    for folder in folders:
        assert sum(f.stat().st_size for f in folder.iterdir()) <= 4e6


def test_loads_offline_and_in_silence(monkeypatch, caplog, recwarn):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        model, processor = embedded.load()
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert type(processor) is transformers.LlavaProcessor
    assert not model.training
    assert not caplog.records
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_no_weight_is_missing_or_left_over():
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        embedded.path(), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_type_and_attention_are_passed_on():
    model, _ = embedded.load(dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"


def test_recommends_original_positions(loaded):
    assert loaded[0].config.vlmprune["positions"] == "original"


def test_one_placeholder_a_patch(loaded):
    model, processor = loaded
    for size in ((224, 224), (300, 180)):
        picture = Image.new("RGB", size, "gray")
        inputs = processor(text="USER: <image>\nhello ASSISTANT:", images=picture)
        assert sum(i == model.config.image_token_id for i in inputs["input_ids"][0]) == 256


def test_tokenizer_round_trip(loaded, listed):
    tokenizer = loaded[1].tokenizer
    for item in listed:
        for asked in item["questions"]:
            for text in (asked["question"], asked["answer"]):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    assert (
        tokenizer("WHERE is the Cat?")["input_ids"] == tokenizer("where is the cat?")["input_ids"]
    )
    assert tokenizer.unk_token_id in tokenizer("quantum")["input_ids"]
    assert tokenizer.padding_side == "left"


def test_chat_template(loaded):
    processor = loaded[1]
    content = [{"type": "image"}, {"type": "text", "text": "where is the cat?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nwhere is the cat? ASSISTANT:"


def test_right_about_the_scenes(loaded, listed):
    assert len(listed) >= 3
    wrong = []
    for item in listed:
        picture = Image.open(embedded.scenes() / item["file"])
        for asked in item["questions"]:
            said = answer(loaded, picture, asked["question"])
            if said.strip() != asked["answer"]:
                wrong.append((item["file"], asked["question"], said, asked["answer"]))
    assert not wrong


def test_a_blank_picture_gives_other_answers(loaded, listed):
    """Control: what the scenes' answers say must come from the picture."""
    blank = Image.new("RGB", (224, 224), (128, 128, 128))
    telling = ("at", "where", "left", "above", "read")
    asked = [q for item in listed for q in item["questions"] if q["kind"] in telling]
    asked = [q for q in asked if q["answer"] != "nothing."]
    same = sum(answer(loaded, blank, q["question"]).strip() == q["answer"] for q in asked)
    assert len(asked) >= 10
    assert same <= len(asked) // 4


def test_pipeline(loaded, listed):
    model, processor = loaded
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    picture = Image.open(embedded.scenes() / listed[0]["file"])
    asked = listed[0]["questions"][0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": asked["question"]}]
    out = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
    assert out[0]["generated_text"].strip() == asked["answer"]


def test_batch_with_padding_answers_as_alone(loaded, listed):
    model, processor = loaded
    picture = Image.open(embedded.scenes() / listed[0]["file"])
    questions = [q["question"] for q in listed[0]["questions"][:4]]
    texts = [f"USER: <image>\n{q} ASSISTANT:" for q in questions]
    inputs = processor(text=texts, images=[picture] * 4, return_tensors="pt", padding=True)
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    together = processor.batch_decode(out, skip_special_tokens=True)
    assert together == [answer(loaded, picture, q) for q in questions]
