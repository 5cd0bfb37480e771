"""benchmarks/credit.py: the numbers on the page against full logits in float64, from the page alone."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHAIN, ROOT
from pages import POISON, data_of, elements, outside, rendered
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import credit
from common.report import page

TEMPLATE = ROOT / "benchmarks" / "credit.html"
WRONG, RIGHT = 0, 1
ROW = {(row.method, row.symbol): r for r, row in enumerate(credit.ROWS)}
HALF = 0.0006  # half of the last digit on the page, and fp32


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The page of the embedded model."""
    out = tmp_path_factory.mktemp("credit") / "credit.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.tasks.chain.SIZE", 16)
        credit.main(credit.Args(model=CHAIN, questions=2, search=16, max_tokens=48, out=str(out)))
    return out.read_text()


@pytest.fixture(scope="module")
def data(html) -> dict:
    return data_of(html)


def in_units(response: dict) -> dict:
    """The response with its thousandths and hundredths as numbers, floats throughout."""
    found = response | {"rows": [row and [x / 1000 for x in row] for row in response["rows"]]}
    found["teachers"] = dict(response["teachers"])
    for name, reader in [(None, response), *response["teachers"].items()]:
        numbers = {key: [x / 1000 for x in reader[key]] for key in ("logp", "kl") if key in reader}
        if name is None:
            found |= numbers
        else:
            found["teachers"][name] = reader | numbers
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHAIN)


@pytest.fixture(scope="module")
def log_probs(data, tokenizer):
    """log_probs(prompt, response): [T, V] at the response's tokens, in float64."""
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float64)
    @torch.no_grad()
    def of(prompt: str, response: dict):
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        before, ids = encode(prompt), [encode(data["words"][word]) for word in response["tokens"]]
        assert all(len(token) == 1 for token in ids)
        ids = [token for token, in ids]
        logits = lm(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
        return logits.log_softmax(-1), torch.tensor(ids)

    return of


def text_of(data: dict, response: dict) -> str:
    return "".join(data["words"][word] for word in response["tokens"])


def test_each_question_has_a_wrong_and_a_right_response(data):
    assert len(data["questions"]) == 2
    for question in data["questions"]:
        assert [response["reward"] for response in question["responses"]] == [0.0, 1.0]
        assert 0 < question["right"] < question["group"]
        for response in question["responses"]:
            said = re.search(r"#### (\d+)", text_of(data, response))
            assert (said is not None and said[1] == question["answer"]) == (response["reward"] == 1.0)
            assert all(values is None or len(values) == len(response["tokens"]) for values in response["rows"])


def test_the_page_shows_grpos_advantage_by_hand(data):
    """From the count of right responses alone: (R − p)/sd with sd² = p(1 − p)·G/(G − 1)."""
    for question in data["questions"]:
        G, p = question["group"], question["right"] / question["group"]
        deviation = (p * (1 - p) * G / (G - 1)) ** 0.5
        for response in question["responses"]:
            expected = (response["reward"] - p) / deviation
            assert in_units(response)["rows"][ROW["GRPO", "A"]] == pytest.approx([expected] * len(response["tokens"]), abs=HALF)


def test_the_page_shows_the_methods_numbers_by_brute_force(data, log_probs):
    response = in_units(data["questions"][0]["responses"][WRONG])
    student, ids = log_probs(response["prompt"], response)
    at = torch.arange(len(ids))
    assert response["logp"] == pytest.approx(student[at, ids].tolist(), abs=HALF)
    A = torch.tensor(response["rows"][ROW["GRPO", "A"]], dtype=torch.float64)
    found = {}
    for name, teacher in response["teachers"].items():
        q, _ = log_probs(teacher["prompt"], response)
        assert teacher["logp"] == pytest.approx(q[at, ids].tolist(), abs=HALF), name
        forward = (q.exp() * (q - student)).sum(-1)  # KL(q‖π)
        reverse = (student.exp() * (student - q)).sum(-1)  # KL(π‖q)
        found[name] = ((q - student)[at, ids], forward, reverse)
    delta = found["rlsd"][0]
    w = (A.sign() * delta).exp()
    expected = {
        ("RLSD", "log w"): w.log(),
        ("RLSD", "Â"): A * (0.5 + 0.5 * w.clamp(0.8, 1.2)),
        ("SDPO", "KL"): found["sdpo"][2],
        ("SDPO", "A_t"): found["sdpo"][0],
        ("HSD", "A_t answer"): found["answer"][0],
        ("HSD", "A_t peer"): found["peer"][0],
        ("HSD", "A_t both"): found["both"][0],
        ("SD-Zero", "KL"): found["reviser"][2],
    }
    assert expected.keys() | {("GRPO", "A")} == ROW.keys()
    for row, values in expected.items():
        assert response["rows"][ROW[row]] == pytest.approx(values.tolist(), abs=2 * HALF), row
    for name in ("answer", "peer", "both"):
        assert response["teachers"][name]["kl"] == pytest.approx(found[name][1].tolist(), abs=HALF)


def test_the_likeliest_tokens_are_those_of_student_and_teacher(data, log_probs, tokenizer):
    response = data["questions"][0]["responses"][RIGHT]
    readers = [response, response["teachers"]["rlsd"]]
    for reader in readers:
        logp, _ = log_probs(reader["prompt"], response)
        values, ids = logp.topk(5)
        for flat, expected, tokens in zip(reader["top"], values.tolist(), ids.tolist()):
            assert [-x / 100 for x in flat[1::2]] == pytest.approx(expected, abs=0.0051)
            texts = [data["words"][word] for word in flat[::2]]
            assert texts[0] == tokenizer.decode([tokens[0]])
            assert len(set(texts)) == 5


def test_every_teacher_sees_what_its_row_says_and_no_more(data):
    for question in data["questions"]:
        for response in question["responses"]:
            prompts = {name: teacher["prompt"] for name, teacher in response["teachers"].items()}
            assert all(question["question"] in prompt for prompt in prompts.values())
            answer = f"The final answer is {question['answer']}."
            has_answer = {name for name, prompt in prompts.items() if answer in prompt}
            has_peer = {name for name, prompt in prompts.items() if "A solution that passed the check" in prompt}
            assert has_answer == {"rlsd", "answer", "both"} & prompts.keys()
            assert has_peer == {"sdpo", "peer", "both"} & prompts.keys() and has_peer >= {"peer"}
            own = text_of(data, response).removesuffix("<|im_end|>")
            assert own in prompts["reviser"]


def test_tau_is_where_the_response_leaves_the_peer_of_its_prompt(data):
    response = data["questions"][0]["responses"][WRONG]
    peer = response["teachers"]["both"]["prompt"].split("passed the check:\n")[1].split("\n\n")[0]
    words = [data["words"][word] for word in response["tokens"]]
    tau = response["tau"]
    assert peer.startswith("".join(words[:tau])) and not (peer + "<|im_end|>").startswith("".join(words[: tau + 1]))


def test_nearly_all_values_lie_within_the_scale(data):
    values = [abs(v) / 1000 for q in data["questions"] for r in q["responses"] for row in r["rows"] if row for v in row]
    assert sum(v <= data["range"] for v in values) >= 0.99 * len(values) or data["range"] == 10


def test_the_page_is_one_small_file_that_loads_nothing(html):
    assert len(html.encode()) < 400_000
    assert outside(html) == []
    scripts = elements(html, "script")
    assert len(scripts) == 2 and all(attributes.keys() <= {"id", "type"} for attributes, _ in scripts)


def poisoned(data: dict) -> dict:
    """The page's data with a hostile text wherever a model or a data set can write."""
    found = json.loads(json.dumps(data))
    found["words"][0] = POISON
    found["model"] = found["task"] = POISON
    for question in found["questions"]:
        question["question"] = question["answer"] = question["feedback"] = POISON
        for response in question["responses"]:
            response["tokens"][0] = 0
            for teacher in response["teachers"].values():
                teacher["prompt"] = POISON
    return found


def test_text_of_a_model_stays_text(data):
    html = page(TEMPLATE, poisoned(data))
    assert data_of(html) == poisoned(data)
    assert len(elements(html, "script")) == 2 and elements(html, "img") == []


LOOK = """
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const where = () => Object.values(document.activeElement.dataset).join(" ");
const steps = [];
buttonAt(0, 0, 0).focus();
for (const name of ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "End", "Home", "ArrowUp"]) { key(name); steps.push(where()); }
document.body.setAttribute("data-steps", steps.join(", "));
buttonAt(7, 0, 0).focus();
document.body.setAttribute("data-tabstops", document.querySelectorAll('.t[tabindex="0"]').length);
document.body.setAttribute("data-wide", document.documentElement.scrollWidth > innerWidth);
"""


def test_a_browser_draws_every_token_and_keys_move_between_them(data, tmp_path):
    """The poisoned page, so that this also shows that a browser runs nothing of it."""
    bad = poisoned(data)
    html = rendered(page(TEMPLATE, bad), tmp_path, LOOK)
    (_, title), = elements(html, "title")
    assert title == "Where the credit falls" and elements(html, "img") == []
    buttons = {tuple(int(a[f"data-{n}"]) for n in ("row", "response", "token")): (a, text)
               for a, text in elements(html, "button") if "data-row" in a}
    responses = [in_units(response) for response in bad["questions"][0]["responses"]]
    count = 0
    for i, response in enumerate(responses):
        for r, values in enumerate(response["rows"]):
            for t, value in enumerate(values or []):
                attributes, text = buttons[r, i, t]
                count += 1
                assert text == bad["words"][response["tokens"][t]]
                classes = attributes["class"].split()
                marked = abs(value) >= 0.05
                assert ("background-color" in attributes.get("style", "")) == marked
                signed = credit.ROWS[r].scale == "signed"
                assert ("negative" in classes) == (signed and value <= -0.05)  # sign without colour
                assert ("positive" in classes) == (signed and value >= 0.05)
                assert ("tau" in classes) == (credit.ROWS[r].method == "HSD" and t == response["tau"])
                assert f"{abs(value):.2f}" in attributes["aria-label"]
    assert count == len(buttons)
    (body, _), = elements(html, "body")
    last = len(responses[WRONG]["tokens"]) - 1
    assert body["data-steps"] == f"0 0 1, 0 0 2, 1 0 2, 1 0 1, 1 0 {last}, 1 0 0, 0 0 0"
    strips = sum(values is not None for response in responses for values in response["rows"])
    assert int(body["data-tabstops"]) == strips  # one stop of the Tab key per strip
    assert body["data-wide"] == "false"
    panel = html[html.index('id="panel"') : html.index('id="data"')]
    assert "log q of the token" in panel and panel.count("<li") == 10  # five of the student, five of the teacher


def test_a_checkpoint_of_a_run_brings_its_own_task(tmp_path):
    run = tmp_path / "step_000001"
    shutil.copytree(CHAIN, run)
    known = {"task": "jsonl:own.jsonl", "kind": "math", "thinking": False, "fields": "", "data_dir": "", "instruction": ""}
    (run / "trainer.json").write_text(json.dumps({"args": known}))
    args = credit.Args(model=str(run))
    path, found = credit.checkpoint(args)
    settings = credit.settings_of(path, found, args)
    assert Path(settings.model) == run and settings.task == "jsonl:own.jsonl" and settings.setup.kind == "math"
    other = credit.settings_of(path, found, credit.Args(model=str(run), task="chain"))
    assert other.task == "chain" and other.setup.kind == ""
    assert credit.settings_of(CHAIN, {}, credit.Args()).task == "chain"
