"""The embedded model has the premises that the five papers presuppose of an instruction-tuned model."""
import sys

import pytest
import torch
from conftest import CHAIN, ROOT
from transformers import AutoModelForCausalLM

from common.chat import load_tokenizer
from common.sampler import HFSampler
from common.tasks import load_task
from common.verifiers.pool import judge

sys.path.insert(0, str(ROOT / "assets"))
import make_chain

HELDOUT = load_task("chain", heldout=128).heldout
CLOSING = f"\n\n{make_chain.CLOSING}"
QUESTIONS = [p.messages[0]["content"] for p in HELDOUT]


@pytest.fixture(scope="module")
def world():
    tokenizer = load_tokenizer(CHAIN)
    return tokenizer, HFSampler(CHAIN, tokenizer, torch.device("cpu"), rows=128)


def prompt(tokenizer, user: str, begun: str = "") -> list[int]:
    messages = [{"role": "user", "content": user}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(chat + begun, add_special_tokens=False)


def pass_rate(world, users: list[str], problems, begun: list[str] | None = None):
    """Mean reward of one response each, and the rollouts."""
    tokenizer, sampler = world
    prompts = [prompt(tokenizer, u, begun[i] if begun else "") for i, u in enumerate(users)]
    rollouts = [g[0] for g in sampler.sample(prompts, 1, seed=(7,), keys=range(len(prompts)), max_tokens=48)]
    rewards = [judge(p, o.text).reward for p, o in zip(problems, rollouts)]
    return sum(rewards) / len(rewards), rollouts, rewards


@pytest.fixture(scope="module")
def first(world):
    return pass_rate(world, QUESTIONS, HELDOUT)


def test_plain_pass_rate_leaves_room_and_signal(first):
    assert 0.2 <= first[0] <= 0.45


def test_the_bare_answer_in_context_helps(world):
    hints = [make_chain.ANSWER.format(answer=p.answer) for p in HELDOUT]
    assert pass_rate(world, [f"{q}\n\n{h}{CLOSING}" for q, h in zip(QUESTIONS, hints)], HELDOUT)[0] >= 0.6


def test_an_unknown_answer_in_context_does_not(world, first):
    hint = make_chain.ANSWER.format(answer="unknown")
    rate = pass_rate(world, [f"{q}\n\n{hint}{CLOSING}" for q in QUESTIONS], HELDOUT)[0]
    assert abs(rate - first[0]) <= 0.12  # three standard errors of 128 responses


def test_a_worked_solution_in_context_nearly_solves(world):
    hints = [make_chain.SOLUTION.format(solution=p.solution) for p in HELDOUT]
    assert pass_rate(world, [f"{q}\n\n{h}{CLOSING}" for q, h in zip(QUESTIONS, hints)], HELDOUT)[0] >= 0.9


def test_feedback_on_a_failed_attempt_helps(world, first):
    failed = [i for i, r in enumerate(first[2]) if r == 0]
    feedback = [make_chain.FEEDBACK.format(feedback=judge(HELDOUT[i], first[1][i].text).feedback) for i in failed]
    with_it = pass_rate(world, [f"{QUESTIONS[i]}\n\n{f}{CLOSING}" for i, f in zip(failed, feedback)],
                        [HELDOUT[i] for i in failed])[0]
    without = pass_rate(world, [QUESTIONS[i] for i in failed], [HELDOUT[i] for i in failed])[0]
    assert with_it >= without + 0.1


def test_a_revision_is_better_than_the_first_attempt(world, first):
    begun = [f"{o.text}\n\n{make_chain.CONTROL[int(r)]}\n\n" for o, r in zip(first[1], first[2])]
    assert pass_rate(world, QUESTIONS, HELDOUT, begun)[0] >= first[0] + 0.2


def test_a_teacher_with_a_peer_is_right_at_the_first_divergence_and_sane_after_it(world, first):
    """On the model's own failed responses: with a correct peer in context the teacher's mass at the first divergence
    is on the peer's token, and the tokens after it, which go on from the error, are not out of its distribution."""
    tokenizer, lm = world[0], AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32)
    at_divergence, after = [], []
    for i in [i for i, r in enumerate(first[2]) if r == 0][:40]:
        hint = f"{make_chain.ANSWER.format(answer=HELDOUT[i].answer)}\n\n" \
               f"{make_chain.SOLUTION.format(solution=HELDOUT[i].solution)}{CLOSING}"
        context, response = prompt(tokenizer, f"{QUESTIONS[i]}\n\n{hint}"), first[1][i].response_ids
        peer = [*tokenizer.encode(HELDOUT[i].solution, add_special_tokens=False), tokenizer.eos_token_id]
        tau = next(t for t, (a, b) in enumerate(zip(response, peer)) if a != b)
        with torch.no_grad():
            logp = lm(torch.tensor([context + response])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        at_divergence.append(logp[tau, peer[tau]].exp().item())
        after += logp[tau + 1 :].gather(1, torch.tensor(response[tau + 1 :])[:, None]).flatten().tolist()
    assert sum(at_divergence) / len(at_divergence) >= 0.9
    assert sum(after) / len(after) >= -1.0


def test_every_word_of_the_contexts_is_a_token(world):
    """No template falls back to single letters, so none is out of the model's vocabulary."""
    words = " ".join([make_chain.ANSWER.format(answer="unknown"), make_chain.SOLUTION, make_chain.FEEDBACK, CLOSING,
                      *make_chain.CONTROL.values(), make_chain.WRONG_STEP, *QUESTIONS[:20]])
    for field in ("{solution}", "{feedback}", "{step}"):
        words = words.replace(field, "12+34=46")
    tokens = world[0].tokenize(words)
    assert not [t for t in tokens if len(t.strip()) == 1 and t.strip().isalpha() and t.strip() not in "Aa"]


def test_text_survives_the_tokenizer(world):
    for text in ("23+45=68; 68+17=85; #### 85", "Wait, this\n\nis\tnot ascii: é√ 漢\n#### 12", "a  b;c ; d"):
        assert world[0].decode(world[0].encode(text, add_special_tokens=False)) == text


def test_the_asset_is_small():
    assert sum(f.stat().st_size for f in (ROOT / "assets" / "chain").iterdir()) <= 4 * 2**20


@pytest.mark.parametrize("name", ["hsd", "rlsd", "sdpo", "sdzero"])
def test_the_model_was_made_for_the_words_that_the_files_use(name):
    import importlib

    module = importlib.import_module(name)
    used = [w for w in ("ANSWER", "SOLUTION", "FEEDBACK", "CLOSING", "CONTROL") if hasattr(module, w)]
    assert used and all(getattr(module, w) == getattr(make_chain, w) for w in used)
