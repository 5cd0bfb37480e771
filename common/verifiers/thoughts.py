"""Which part of a response counts: what follows the last thought."""
from __future__ import annotations

from collections.abc import Sequence

THOUGHTS = (  # what opens and what closes a thought; <reasoning> is a format that prompts ask for
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3 and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("<think:opensource>", "</think:opensource>"),  # Hy3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|think|>", "<|content|>"),  # Solar Open
    ("<|channel|>", "<|channel|>final<|message|>"),  # gpt-oss: every channel but the final one
)


def open_thought(text: str) -> str:
    """The tag of a thought that the text opens and does not close, or "".

    >>> open_thought("<think>5</think>6"), open_thought("[THINK]5[/THINK]6 [THINK]7")
    ('', '[THINK]')
    """
    for opening, closing in THOUGHTS:
        if opening in text.rpartition(closing)[2]:
            return opening
    return ""


def after_thoughts(text: str) -> str:
    """What follows the last thought; nothing when a thought is still open."""
    if open_thought(text):
        return ""
    for _, closing in THOUGHTS:
        _, closed, rest = text.rpartition(closing)
        if closed:
            text = rest.lstrip("\n")
    return text


def final_part(text: str, restarts: Sequence[str] = ()) -> str:
    """What follows the last thought, and of that the last attempt.

    restarts: the phrases with which a response begins another attempt, if it may.

    >>> final_part("<think>5</think>It is 6. Once more: 7", ["Once more:"])
    ' 7'
    >>> final_part("<think>So 5")
    ''
    """
    text = after_thoughts(text)
    begin = 0
    for phrase in restarts:
        place = text.rfind(phrase)
        if place >= 0:
            begin = max(begin, place + len(phrase))
    return text[begin:]
