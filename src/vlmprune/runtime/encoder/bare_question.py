"""A question as somebody asked it, out of a prompt: no template's words, no task's instruction.

What a template puts around a turn is known only as text, for a model's ids tell no more. Imports
nothing.
"""

from __future__ import annotations

import re

WORD_OR_PHRASE = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluation writes after a question that has a short answer."""

OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA's evaluation writes after a question with options."""

_INSTRUCTIONS = re.compile(
    "|".join(rf"\s*{re.escape(one.strip())}" for one in (WORD_OR_PHRASE, OPTION_LETTER))
)
# How a turn of the user begins, and how the answer's begins: of Vicuna and LLaVA, Idefics, Mistral
# and older ones on any line, of ChatML and Gemma on a line of their own, of Llama 3 straight behind
# the sentence before, as what stands between is special tokens.
_BEGINS = re.compile(
    r"\bUSER:|\bUser:|\bHuman:|\[INST\]|^[ \t]*user[ \t]*$|(?<![\w\s])user\n\n", re.MULTILINE
)
_ENDS = re.compile(
    r"(?:(?<!\w)(?:ASSISTANT:|Assistant:|\[/INST\])|(?:^|\n)[ \t]*(?:assistant|model)"
    r"|(?<!\s)assistant\n\n)\s*$"
)


def bare(text: str) -> str:
    """The last question of a prompt's text.

    Args:
        text: of the prompt, without special tokens.

    Returns:
        What stands behind the last beginning of a user's turn, without the words that begin the
        answer and without the instructions of LLaVA's evaluation; empty where nothing is left.
    """
    turns = list(_BEGINS.finditer(text))
    asked = text[turns[-1].end() :] if turns else text
    return _INSTRUCTIONS.sub("", _ENDS.sub("", asked)).strip()
