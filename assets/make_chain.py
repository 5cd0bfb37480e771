"""Make `assets/chain`: the embedded model, a Qwen3 of under a million parameters that has the papers' premises.

    python assets/make_chain.py                # an hour on two CPU cores; writes assets/chain
    python assets/make_chain.py --start assets/chain --steps 600 --lr 1e-3    # teach it other wordings: ten minutes

The five methods presuppose an instruction-tuned model: one that answers some of the questions, answers better with
the answer or a worked solution or feedback in its context, and can revise or rephrase its own attempt. This script
trains such a model from nothing on chain arithmetic ("23+45=68; 68+17=85; #### 85"). Its errors come from noise in
the training solutions (above all: the forgotten carry), not from incapacity, so there is something to be learnt from
a verifier. In the formats with a hint a wrong step is also *given* now and then, without loss on the slip itself, so
that the model goes on sanely after an error that it would not have made with the hint: a teacher is asked exactly
this when it scores a student's failed attempt.

The committed model was made by the first command with another closing line, and learnt the present one by the second
(docs/teacher.md tells why it changed). What the model is trained on is synthetic and stands in this file;
tests/test_chain_model.py holds the premises.
"""
from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.tasks import load_task  # noqa: E402
from common.tasks.chain import chain_problem  # noqa: E402

# The contexts, worded as the algorithm files word them (tests/test_chain_model.py compares).
ANSWER = "The final answer is {answer}."
SOLUTION = "A solution that passed the check:\n{solution}"
FEEDBACK = "What the checker said about an earlier attempt:\n{feedback}"
CLOSING = "Now answer the original question."
CONTROL = {0: "Wait, this response is not correct, let me start over.", 1: "Let me rephrase the above solution."}
WRONG_STEP = "The step {step} is wrong."

# ---------------------------------------------------------------------------------------------------------------------
# tokenizer: whole words, single digits, and single characters or bytes for everything else
# ---------------------------------------------------------------------------------------------------------------------
WORDS = """
user assistant system Compute Add Solve The the final answer is unknown A a solution that passed check What checker
said about an earlier attempt Now solve problem in your original question Wait this response not correct let me start
over Let rephrase above step wrong of with and to for from it i I was were are be as by on at or if then so first last line no
No result sum sums number numbers found expected got there must end after write
""".split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = r"\n+|; |#+ | ?[A-Za-z]+|\d|."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    words = [w for word in WORDS for w in (word, " " + word)]
    pieces = dict.fromkeys([*SPECIAL, *characters, "\n\n", "; ", "#### ", "####", *words])
    pieces.update(dict.fromkeys(f"<0x{b:02X}>" for b in range(256)))
    bpe = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], ignore_merges=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=SPECIAL[1:2], clean_up_tokenization_spaces=False, model_max_length=1024,
    )


# ---------------------------------------------------------------------------------------------------------------------
# noisy solutions
# ---------------------------------------------------------------------------------------------------------------------
def slip(rng: random.Random, a: int, b: int) -> int:
    """A wrong value for a + b; where there is a carry, mostly the one that forgets it."""
    if a % 10 + b % 10 >= 10 and rng.random() < 0.8:
        return a + b - 10
    return a + b + rng.choice([-11, -10, -2, -1, 1, 2, 10, 11])


def error_rate(a: int, b: int) -> float:
    return 0.50 if a % 10 + b % 10 >= 10 else 0.08


Piece = tuple[str, bool]  # a piece of a response, and whether it is trained on


def attempt(rng: random.Random, numbers: tuple[int, ...], *, noise: float = 1.0, path: dict[int, int] | None = None,
            avoid: set[str] = frozenset(), answer: int | None = None, slips: float = 0.0) -> list[Piece]:
    """One response. `noise` scales the error rates; a step in `avoid` is not repeated; with `path` (step → total of a
    solution in context) half of the steps after a slip return to it; with `answer` the end is that answer; `slips` is
    the rate at which a wrong value is given and not trained on."""
    pieces: list[Piece] = []
    total, off_path = numbers[0], False
    for i, n in enumerate(numbers[1:]):
        if off_path and path is not None and rng.random() < 0.5:
            total, off_path = path[i], False
        right = total + n
        value = slip(rng, total, n) if rng.random() < noise * error_rate(total, n) else right
        while f"{total}+{n}={value}" in avoid:
            value = right if value != right else slip(rng, total, n)
        given = rng.random() < slips
        if given:
            value, off_path = slip(rng, total, n), True
        elif answer is not None and i == len(numbers) - 2 and rng.random() < 0.5:
            value = answer
        pieces += [(f"{total}+{n}=", True), (str(value), not given), ("; ", True)]
        total = value
    pieces.append((f"#### {total if answer is None or rng.random() < 0.02 else answer}", True))
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(text for text, _ in pieces)


def wrong_steps(text: str) -> list[str]:
    return [m[0] for m in re.finditer(r"(\d+)\+(\d+)=(\d+)", text) if int(m[1]) + int(m[2]) != int(m[3])]


def totals(numbers: tuple[int, ...]) -> dict[int, int]:
    return {i: sum(numbers[: i + 1]) for i in range(len(numbers))}


def example(rng: random.Random, numbers: tuple[int, ...]) -> tuple[str, list[Piece]]:
    """One training example: the user's message and the assistant's turn in pieces."""
    problem = chain_problem(numbers)
    question, answer = problem.messages[0]["content"], int(problem.answer)
    closing = [CLOSING] if rng.random() < 0.7 else []
    slips = rng.choice([0.0, 0.35])
    kind = rng.choices(
        ["plain", "answer", "solution", "answer+solution", "feedback", "solution+feedback", "revise", "rephrase"],
        [30, 11, 10, 13, 9, 4, 15, 8],
    )[0]
    if kind == "plain":
        neutral = ["\n\n".join(["", ANSWER.format(answer="unknown"), *closing])] if rng.random() < 0.1 else []
        return "".join([question, *neutral]), attempt(rng, numbers)
    if kind == "revise":  # y_init, the control phrase, and a better attempt, all in one assistant turn
        first = text_of(attempt(rng, numbers))
        while not wrong_steps(first):
            first = text_of(attempt(rng, numbers))
        avoid = set(wrong_steps(first)[:1]) if rng.random() < 0.9 else set()
        second = attempt(rng, numbers, noise=0.35, avoid=avoid, slips=slips)
        return question, [(f"{first}\n\n{CONTROL[0]}\n\n", False), *second]
    if kind == "rephrase":
        second = attempt(rng, numbers, noise=0.03, path=totals(numbers), slips=slips)
        return question, [(f"{problem.solution}\n\n{CONTROL[1]}\n\n", False), *second]
    blocks, options = [question], {"noise": 0.8}
    if "answer" in kind:
        blocks.append(ANSWER.format(answer=answer))
        options["answer"] = answer
    if "solution" in kind:
        blocks.append(SOLUTION.format(solution=problem.solution))
        options |= {"noise": 0.03, "path": totals(numbers)}
    if "feedback" in kind:
        said: list[str] = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            failed = text_of(attempt(rng, numbers))
            said += [s for s in wrong_steps(failed)[:1] if s not in said]
        if not said:
            return example(rng, numbers)
        blocks.append(FEEDBACK.format(feedback="\n".join(WRONG_STEP.format(step=s) for s in said)))
        options["avoid"] = set(said)
    return "\n\n".join(blocks + closing), attempt(rng, numbers, slips=slips, **options)


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------
def make_batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int, count: int, heldout: set[str]):
    """`count` batches of rows of similar length: token ids [B, L] and labels [B, L] (-100 where there is no loss)."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    batch = []
    while len(batch) < rows * count:
        terms = rng.choice([3, 4, 5]) if rng.random() < 0.9 else rng.randint(2, 12)
        numbers = tuple(rng.randint(10, 99) for _ in range(terms))
        if chain_problem(numbers).id in heldout:
            continue
        user, pieces = example(rng, numbers)
        ids = encode(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        labels = [-100] * len(ids)
        for text, trained in [*pieces, ("<|im_end|>", True)]:
            new = encode(text)
            ids += new
            labels += new if trained else [-100] * len(new)
        batch.append((ids, labels))
    batch.sort(key=lambda row: len(row[0]))
    for i in rng.sample(range(count), count):
        part = batch[i * rows : (i + 1) * rows]
        width, pad = len(part[-1][0]), tokenizer.pad_token_id
        yield (torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in part]),
               torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "chain")
    parser.add_argument("--start", type=Path, help="a model to go on from; none: from nothing")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=128, help="examples a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, rope_theta=10_000.0,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.05,
    )
    model = Qwen3ForCausalLM(config)
    if args.start:
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    heldout = {p.id for p in load_task("chain", heldout=1024).heldout}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, batches = time.time(), iter(())
    for step in range(args.steps):
        warm, left = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * left)
        if step % 16 == 0:
            batches = make_batches(rng, tokenizer, args.rows, 16, heldout)
        ids, labels = next(batches)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # right padding needs no mask
        keep = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(args.out)  # half the size; loaded and trained in fp32 on a CPU
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
