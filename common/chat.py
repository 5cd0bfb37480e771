"""Chat templates and tokenizers: from messages to a prompt's ids, from a response's ids to text.

Templates differ in ways that a checkpoint's name does not tell. `load_tokenizer` therefore renders
small chats, reads from them how the template begins and ends a turn, and ends the run if training
with the template would be wrong. Student and teacher prompts come from the same `chat_ids`.
"""
from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from common import require
from common.architecture import check_path
from common.tasks import Problem
from common.verifiers.thoughts import THOUGHTS, open_thought

SYSTEM = {"role": "system", "content": "Be brief."}  # the messages of the small chats
QUESTION = {"role": "user", "content": "Is 7 prime?"}
ANSWER = {"role": "assistant", "content": "Seven is prime."}
THOUGHT = "One, seven."
TODAY = datetime(2024, 7, 26)  # the date that Llama's templates use if they get no clock
SWITCHES = ("enable_thinking", "thinking", "reasoning", "thinking_budget")  # for --thinking
REFUSALS = (TemplateError, TypeError, ValueError)  # what a template raises


# --------------------------------------------------------------------------------------------------
# messages → ids
# --------------------------------------------------------------------------------------------------
def chat_ids(tokenizer: Tokenizer, messages: list[dict], thinking: bool = False) -> list[int]:
    """Token ids of a chat that the model is to answer."""
    if messages[0]["role"] == "system" and not takes_system(tokenizer):
        messages = fold_system(messages)
    options = template_options(thinking)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                         return_dict=False, **options)


def render(tokenizer: Tokenizer, messages: list[dict], thinking: bool = False, *,
           generation_prompt: bool = True, **variables) -> str:
    """The text of a chat, just as the template writes it."""
    options = {**template_options(thinking), **variables}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt,
                                         tokenize=False, **options)


def template_options(thinking: bool) -> dict:
    """The variables of every template: the thinking switch under each of its names, and a clock.

    The clock is fixed: a prompt must be the same on every day, or a resumed run would differ.
    """
    budget = -1 if thinking else 0  # Seed-OSS counts tokens of thought; -1 is no limit
    switch = dict(zip(SWITCHES, (thinking, thinking, thinking, budget)))
    return {**switch, "strftime_now": TODAY.strftime}


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the template shows a system message: Gemma's raises an error, others leave it out."""
    try:
        return SYSTEM["content"] in render(tokenizer, [SYSTEM, QUESTION])
    except REFUSALS:
        return False


def fold_system(messages: list[dict]) -> list[dict]:
    """Put the system message before the user's, as its first paragraph (Gemma 3's template does).

    >>> fold_system([SYSTEM, QUESTION])
    [{'role': 'user', 'content': 'Be brief.\\n\\nIs 7 prime?'}]
    """
    system, user, *rest = messages
    content = f"{system['content']}\n\n{user['content']}"
    return [{**user, "content": content}, *rest]


# --------------------------------------------------------------------------------------------------
# how the template begins and ends a turn
# --------------------------------------------------------------------------------------------------
def turn_start(tokenizer: Tokenizer, thinking: bool = False) -> str:
    """What the template writes after the user's text when the model is to answer."""
    return render(tokenizer, [QUESTION], thinking).rpartition(QUESTION["content"])[2]


def turn_tail(tokenizer: Tokenizer, *following: dict) -> str:
    """What the template writes after an assistant's text, up to the text of the next message."""
    chat = [QUESTION, ANSWER, *following]
    text = render(tokenizer, chat, generation_prompt=False)
    _, found, tail = text.partition(ANSWER["content"])
    if not found:
        return ""
    return tail.partition(QUESTION["content"])[0]


def around_thought(tokenizer: Tokenizer) -> tuple[str, str]:
    """What the template writes before a turn's thought, and what it writes between the thought and
    the answer; two empty strings if it shows no thoughts."""
    names = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT)
    chat = [QUESTION, {**ANSWER, **names}]
    try:
        text = render(tokenizer, chat, thinking=True, generation_prompt=False)
    except REFUSALS:
        return "", ""
    before, found, after = text.partition(QUESTION["content"])[2].partition(THOUGHT)
    if not found:
        return "", ""
    return before, after.partition(ANSWER["content"])[0]


def turn_end(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> int | None:
    """The token that ends an assistant's turn: the first of the model's `ends` that the template
    writes after the turn's text; if there is none, the first control token there; if there is none
    either, the eos. A token that also ends a thought does not count (Solar Open has one)."""
    last, inner = turn_tail(tokenizer), turn_tail(tokenizer, QUESTION)
    closing = tokenizer.encode(around_thought(tokenizer)[1], add_special_tokens=False)
    for tail in (last, inner):  # GLM-4 ends a turn with the next role's token
        ids = tokenizer.encode(tail, add_special_tokens=False)
        known = [i for i in ids if i in ends]
        controls = [i for i in ids if is_control(tokenizer, i) and i not in closing]
        found = known or controls
        if found:
            return found[0]
    return tokenizer.eos_token_id


def end_tokens(path: str, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a response: the model's (some have several), the tokenizer's eos, and
    the end of the template's turn, which base models of Qwen2.5 do not name."""
    try:
        given = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # there is no such file
        given = AutoConfig.from_pretrained(path).get_text_config().eos_token_id
    ends = given if isinstance(given, list) else [given]
    ends = [e for e in [*ends, tokenizer.eos_token_id] if e is not None]
    end = turn_end(tokenizer, ends)
    if end is not None:
        ends.append(end)
    return sorted(set(ends))


# --------------------------------------------------------------------------------------------------
# ids → text, and text that cannot become control tokens
# --------------------------------------------------------------------------------------------------
def response_text(tokenizer: Tokenizer, prompt: list[int], response: list[int]) -> str:
    """The text of a response for verifiers and people: without special tokens, but with the tags of
    thoughts, including one that the prompt opened."""
    special = special_tokens(tokenizer)
    shown = [i for i in response if i not in special or is_thought_tag(special[i])]
    return opened_tag(tokenizer, prompt) + tokenizer.decode(shown)


def opened_tag(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The tag of the thought that is open at the end of a prompt, or "". Only the assistant's turn
    counts. It begins after the last control token that is not a thought tag."""
    controls = control_tokens(tokenizer)
    turn: list[int] = []
    for token in reversed(prompt):
        if token in controls and not is_thought_tag(controls[token]):
            break
        turn.append(token)
    return open_thought(tokenizer.decode(turn[::-1]))


def as_text(tokenizer: Tokenizer, text: str) -> str:
    """The text with a space inside each control token's string, for use in another prompt.

    A response, or feedback that quotes one, could otherwise end the user's turn and write turns of
    its own. Text without control tokens is not changed.
    """
    controls = control_tokens(tokenizer)
    for token in controls.values():
        apart = f"{token[:1]} {token[1:]}"
        while token in text and token not in apart:
            text = text.replace(token, apart)
    forged = set(controls)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        forged.discard(tokenizer.unk_token_id)  # the token of characters that have no other
    ids = tokenizer.encode(text, add_special_tokens=False)
    while forged.intersection(ids):  # a normaliser makes one of another string: of <|IM_END|>, say
        text = tokenizer.decode([i for i in ids if i not in forged])
        ids = tokenizer.encode(text, add_special_tokens=False)
    return text


@lru_cache(maxsize=16)
def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Special tokens by id: those with a name (eos, pad …) and those marked special in the file."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            found[i] = token.content
    return found


@lru_cache(maxsize=16)
def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Special tokens by id, with the tokens of a turn that some families do not mark as special."""
    text = render(tokenizer, [QUESTION, ANSWER], generation_prompt=False) + turn_start(tokenizer)
    for message in (QUESTION, ANSWER):
        text = text.replace(message["content"], "\n")
    found = dict(special_tokens(tokenizer))
    for i in tokenizer.encode(text, add_special_tokens=False):
        if is_control(tokenizer, i):
            found[i] = tokenizer.convert_ids_to_tokens(i)
    return found


def is_control(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token that the template writes is a control token: special, or an added token such
    as <|User|> that is neither white space nor a plain word."""
    if token in special_tokens(tokenizer):
        return True
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and re.search(r"\w\W|\W\w", added.content.strip()) is not None


def is_thought_tag(token: str) -> bool:
    """Whether a special token is a tag of thoughts or part of one, as gpt-oss's <|channel|> is."""
    return any(token in tag for pair in THOUGHTS for tag in pair)


# --------------------------------------------------------------------------------------------------
# checks at load
# --------------------------------------------------------------------------------------------------
def load_tokenizer(path: str, thinking: bool = False,
                   problems: Sequence[Problem] = ()) -> Tokenizer:
    """The tokenizer at `path` (a folder or a hub id). Raises SystemExit if there is none, if it has
    no chat template, or if it does not fit the model, --thinking or the problems."""
    check_path(path)
    model = f"--model {path}: its"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise SystemExit(f"error: {model} tokenizer cannot be loaded: {reason}") from None
    require(tokenizer.chat_template, f"{model} tokenizer has no chat template; use an "
            "instruction-tuned checkpoint, or set tokenizer.chat_template and save it again")
    check_texts(model, tokenizer, thinking)
    check_thinking(model, tokenizer, thinking)
    check_turn(model, tokenizer, thinking)
    check_roles(model, tokenizer, thinking, problems)
    check_embedding(path, tokenizer, thinking, problems)
    return tokenizer


def check_texts(model: str, tokenizer: Tokenizer, thinking: bool) -> None:
    """Check that the template shows a question and its answer, after one BOS at most."""
    remedy = "set another tokenizer.chat_template and save it again"
    try:
        asked = render(tokenizer, [QUESTION], thinking)
        finished = render(tokenizer, [QUESTION, ANSWER], thinking, generation_prompt=False)
    except REFUSALS as error:
        reason = first_line(error)
        raise SystemExit(f"error: {model} chat template refuses a question and its answer "
                         f"({reason}); {remedy}") from None
    shown = QUESTION["content"] in asked and ANSWER["content"] in finished
    require(shown, f"{model} chat template leaves out the text of a message; {remedy}")
    bos = tokenizer.bos_token
    twice = bos is not None and asked.startswith(bos + bos)
    require(not twice, f"{model} chat template begins with two {bos}; take one of them out")


def check_thinking(model: str, tokenizer: Tokenizer, thinking: bool) -> None:
    """Check that --thinking changes the prompt, and that no other thinking switch is on."""
    asked = render(tokenizer, [QUESTION], thinking)
    switched = asked != render(tokenizer, [QUESTION], not thinking)
    require(switched or not thinking, f"{model} chat template has no thinking switch of the names "
            f"{', '.join(SWITCHES)}; leave out --thinking, or set another name at its head")
    source = tokenizer.get_chat_template()
    names = set(re.findall(r"\b\w*(?:think|reason)\w*", source, re.IGNORECASE))
    for name in sorted(names.difference(SWITCHES)):
        try:
            off = render(tokenizer, [QUESTION], thinking, **{name: False})
            on = render(tokenizer, [QUESTION], thinking, **{name: True})
        except REFUSALS:  # it takes other values, so it is no switch
            continue
        unknown = off != asked and on == asked
        require(not unknown, f"{model} chat template has a switch {name} that is on and that "
                f"--thinking does not turn; write {{% set {name} = false %}} (or true) at its head")


def check_turn(model: str, tokenizer: Tokenizer, thinking: bool) -> None:
    """Check that a prompt ends as a finished turn begins, apart from thought tags, and that a token
    ends the turn."""
    asked = render(tokenizer, [QUESTION], thinking)
    ignored = asked == render(tokenizer, [QUESTION], thinking, generation_prompt=False)
    finished = render(tokenizer, [QUESTION, ANSWER], thinking, generation_prompt=False)
    written = finished.partition(QUESTION["content"])[2].rpartition(ANSWER["content"])[0]
    start = turn_start(tokenizer, thinking)

    header = without_tags(written.removeprefix(start))
    tail = turn_tail(tokenizer)
    closed = without_space(tail).endswith(without_space(start))  # the prompt only ends a turn
    first = tokenizer.encode(header, add_special_tokens=False)[:1]
    users = tokenizer.encode(asked.partition(QUESTION["content"])[0], add_special_tokens=False)
    role = closed or set(first) <= set(users)  # and no tag of an answer, as Command R7B has one
    missing = ignored and role and written.startswith(start) and header != ""
    require(not missing, f"{model} chat template has no generation prompt: it does not write the "
            f"{header!r} that begins a turn; add {{% if add_generation_prompt %}} … {{% endif %}}")

    begun = without_space(written).startswith(without_space(start))
    before, closing = around_thought(tokenizer)
    opened = closing.strip() != "" and without_space(before) == without_space(start)
    tagged = without_tags(start) != start.strip()
    fits = tagged or (begun and not opened)
    require(fits, f"{model} chat template begins a response with {start.strip()!r}, which begins "
            "no answer and has no known tag of thoughts; if it opens a thought, add the tag to "
            "THOUGHTS in common/verifiers/thoughts.py")

    ids = tokenizer.encode(tail, add_special_tokens=False)
    ended = tail.strip() == "" or any(is_control(tokenizer, i) for i in ids)
    require(ended, f"{model} chat template ends a turn with {tail.strip()!r}, which is no special "
            "token of the tokenizer, so no response would end; add it, or write {{ eos_token }}")


def check_roles(model: str, tokenizer: Tokenizer, thinking: bool,
                problems: Sequence[Problem]) -> None:
    """Check that the template takes the roles of every problem."""
    examples = {tuple(message["role"] for message in p.messages): p for p in problems}
    for roles, problem in examples.items():
        try:
            chat_ids(tokenizer, problem.messages, thinking)
        except REFUSALS as error:
            reason = first_line(error)
            raise SystemExit(f"error: {model} chat template refuses problem {problem.id} with the "
                             f"roles {', '.join(roles)} ({reason}); take other data or another "
                             "model") from None
    system = any(roles[0] == "system" for roles in examples)
    if system and not takes_system(tokenizer) and os.environ.get("RANK", "0") == "0":
        print(f"note: {model} chat template takes no system message; its text begins the user's",
              flush=True)


def check_embedding(path: str, tokenizer: Tokenizer, thinking: bool,
                    problems: Sequence[Problem]) -> None:
    """Check that the model's embedding has every token that can occur. The tokenizer may have more
    tokens if nothing uses them: Gemma 3's has one for images."""
    rows = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    remedy = (f"and the model's embedding has {rows} rows; use the model's own tokenizer, or call "
              "model.resize_token_embeddings and save the model again")
    for token, i in beyond.items():
        special = i in special_tokens(tokenizer)
        require(special, f"--model {path}: its tokenizer has token {i} ({token!r}), {remedy}")
    ends = end_tokens(path, tokenizer)
    require(ends, f"--model {path}: no token ends a response; set tokenizer.eos_token and save it")
    for i in [*chat_ids(tokenizer, [QUESTION], thinking), *ends]:
        require(i < rows, f"--model {path}: its chat template or its eos uses token {i}, {remedy}")
    if beyond:
        check_unused(beyond, problems, remedy)


def check_unused(tokens: dict[str, int], problems: Sequence[Problem], remedy: str) -> None:
    """Check that no problem contains one of the tokens."""
    for problem in problems:
        texts = [message["content"] for message in problem.messages]
        text = "\n".join([*texts, problem.answer or "", problem.solution or ""])
        for token, i in tokens.items():
            require(token not in text, f"problem {problem.id} has token {i} ({token!r}), {remedy}")


def without_tags(text: str) -> str:
    """The text without thought tags, and without white space at its ends."""
    tags = [tag for pair in THOUGHTS for tag in pair]
    for tag in sorted(tags, key=len, reverse=True):
        text = text.replace(tag, "")
    return text.strip()


def without_space(text: str) -> str:
    return "".join(text.split())


def first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
