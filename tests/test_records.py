"""Problem files as people have them: each public layout is read as what it is, and bad input is one line."""
import base64
import gzip
import json
import pickle
import zlib

import pyarrow
import pytest
from pyarrow import parquet
from test_sandbox import bubblewrap_works

from common.tasks import load_problems, load_task
from common.tasks.choice import INSTRUCTION as LETTER
from common.tasks.kinds import as_problem
from common.tasks.maths import INSTRUCTION as BOX
from common.tasks.records import BadRecord
from common.verifiers.pool import Verifier, judge

DAPO = "Solve the problem. The last line must be of the form Answer: $Answer.\n\nWhat is 17 + 17?"
VERL = {  # DAPO-17k and the files that verl's scripts write
    "data_source": "math_dapo", "prompt": [{"role": "user", "content": DAPO}], "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b6eb4"},
}
OPENR1 = {
    "problem": "Find $x$ if $2x = 5$.", "solution": "Halve: $x = 5/2$.", "answer": "\\frac{5}{2}", "problem_type": "Algebra",
    "question_type": "math-word-problem", "source": "olympiads", "uuid": "4f", "is_reasoning_complete": [True],
    "generations": ["<think>…</think>"], "correctness_math_verify": [True], "correctness_llama": None,
    "messages": [{"role": "user", "content": "Find $x$ if $2x = 5$."}, {"role": "assistant", "content": "…"}],
}
LAYOUTS = {  # name → record, kind, answer (also in the form that golds get), what the question must and must not have
    "GSM8K": ({"question": "2 eggs and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "math", "5", "2 eggs", "####"),
    "MATH": ({"problem": "Square 3.", "level": "Level 1", "type": "Algebra", "solution": r"$3^2=\boxed{9}$."},
             "math", "9", "Square 3.", "boxed{9}"),
    "AIME by year": ({"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "Find w.", "Answer": "060", "Part": None},
                     "math", "060", "Find w.", "1983"),
    "AIME 2024": ({"ID": "2024-II-4", "Problem": "Find m+n.", "Solution": "so 033", "Answer": 33}, "math", "33", "Find m+n.", "so"),
    "Minerva": ({"question": "How many joules?", "answer": "2.75e11"}, "math", "2.75e11|2.75 \\times 10^{11}", "joules", "e11"),
    "OlympiadBench": ({"id": 2231, "subfield": "Algebra", "context": "Let $a$ be odd.", "question": "Find $a$.",
                       "solution": ["$a=3$"], "final_answer": ["$3$"], "is_multiple_answer": False, "unit": None,
                       "answer_type": "Numerical", "error": None}, "math", "$3$|3", "Let $a$ be odd.\n\nFind $a$.", "Numerical"),
    "OlympiadBench, several": ({"question": "Roots of x²=1?", "final_answer": ["1", "-1"], "is_multiple_answer": True},
                               "math", "1, -1", "Roots", "-1\n"),
    "ASDiv": ({"body": "Ann has 61 cookies.", "question": "How many has she?", "solution_type": "Sum",
               "answer": "61 (cookies)", "formula": "61=61"}, "math", "61 (cookies)|61", "Ann has 61 cookies.\n\nHow many", "Sum"),
    "SVAMP": ({"ID": "chal-1", "Body": "Bo has 8.", "Question": "How many?", "Equation": "( 8.0 )", "Answer": 8.0,
               "Type": "Sum"}, "math", "8.0|8", "Bo has 8.\n\nHow many?", "Sum"),
    "DAPO": (VERL, "math", "34", DAPO, BOX),
    "OpenR1": (OPENR1, "math", "\\frac{5}{2}", "Find $x$", "…"),
    "DeepScaleR": ({"problem": "1+1?", "answer": "2", "solution": "It is \\boxed{2}."}, "math", "2", "1+1?", "It is"),
    "a JSON number": ({"question": "?", "answer": 1e-07}, "math", "0.0000001", "?", "e-07"),
    "MMLU": ({"question": "A metal?", "subject": "chemistry", "choices": ["neon", "iron", "xenon", "argon"], "answer": 1},
             "choice", "B", f"A metal?\n\nA: neon\nB: iron\nC: xenon\nD: argon\n\n{LETTER}", "chemistry"),
    "MMLU-Pro": ({"question_id": 70, "question": "?", "options": list("qwertyuiop"), "answer": "I", "answer_index": 8,
                  "cot_content": "", "category": "business", "src": "x"}, "choice", "I", "I: o\nJ: p", "business"),
    "ARC": ({"id": "x", "question": "?", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "2"},
            "choice", "2", "1: p\n2: q", "A:"),
    "SciKnowEval": ({"prompt": {"default": "Choose."}, "question": "?", "choices": {"text": ["p", "q"], "label": ["A", "B"]},
                     "answer": "", "answerKey": "A", "type": "mcq-2-choices", "domain": "Physics",
                     "details": {"level": "L3", "task": "t", "subtask": "s", "source": "c"}}, "choice", "A", "A: p\nB: q", "Choose"),
    "ToolAlpaca": ({"prompt": "Find one.", "golden_answer": [{"Action": "a", "Action_Input": "{}"}]},
                   "tool", '[{"Action": "a", "Action_Input": "{}"}]', "Find one.", "Action"),
    "verl, GSM8K": ({"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "2+3? Answer after \"####\"."}],
                     "ability": "math", "reward_model": {"style": "rule", "ground_truth": "5"},
                     "extra_info": {"split": "train", "index": 0, "answer": "#### 5", "question": "2+3?"}},
                    "math", "5", "2+3?", BOX),
    "MedMCQA": ({"question": "?", "opa": "p", "opb": "q", "opc": "r", "opd": "s", "cop": 2, "exp": "x"}, "choice", "C", "C: r", "x"),
    "MedQA": ({"question": "?", "answer": "iron", "options": {"A": "neon", "B": "iron"}, "answer_idx": "B"}, "choice", "B", "B: iron", "C:"),
    "HellaSwag": ({"ctx": "He sits.", "endings": ["p", "q"], "label": "1", "ind": 4}, "choice", "B", "He sits.\n\nA: p\nB: q", "4"),
    "SocialIQA": ({"context": "Ann ran.", "question": "Why?", "answerA": "p", "answerB": "q", "answerC": "r", "label": "2"},
                  "choice", "2", "Ann ran.\n\nWhy?\n\n1: p\n2: q", "A:"),
    "GPQA": ({"Question": "?", "Correct Answer": "d", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"},
             "choice", "A", "A: d\nB: c\nC: a\nD: b", "E:"),
    "AQuA": ({"question": "?", "options": ["A)21", "B)22"], "rationale": "r", "correct": "B"}, "choice", "B", "B: 22", "B)"),
    "MathQA": ({"Problem": "?", "Rationale": "r", "options": "a ) 38 , b ) 27.675", "correct": "b"}, "choice", "B", "A: 38\nB: 27.675", " ,"),
    "BoolQ": ({"question": "Is it?", "passage": "It is.", "answer": True}, "choice", "A", "It is.\n\nIs it?\n\nA: yes\nB: no", "True"),
    "TruthfulQA": ({"question": "?", "mc1_targets": {"choices": ["p", "q"], "labels": [1, 0]}}, "choice", "B", "A: q\nB: p", "labels"),
    "MetaMath": ({"query": "?", "response": "so\n#### 5\nThe answer is: 5", "type": "GSM"}, "math", "5", "?", "so"),
    "Orca-Math": ({"question": "?", "answer": "It takes long, so the answer is \\boxed{3}."}, "math", "3", "?", "long"),
    "a list as text": ({"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": '["402"]'}}, "math", "402", "?", "402"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_public_layout_is_read_unchanged(layout):
    record, kind, answer, shown, hidden = LAYOUTS[layout]
    problem = as_problem(record, "here")
    text = problem.messages[-1]["content"]
    assert problem.kind == kind and problem.answer in answer.split("|")
    assert shown in text and hidden not in text


def test_a_chat_keeps_its_messages_and_gets_an_instruction_only_if_it_has_none():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "1+1?"}]
    problem = as_problem({"prompt": chat, "answer": "2"}, "here")
    assert problem.messages[:3] == chat[:3] and problem.messages[3]["content"] == f"1+1?\n\n{BOX}"
    assert as_problem({"prompt": chat, "answer": "2"}, "here", "", "").messages == chat
    other = as_problem({"prompt": [*chat[:2], {**chat[2], "content": "Hm."}, chat[3]], "answer": "3"}, "here")
    assert other.id != problem.id  # the same last question in another chat is another question
    answered = as_problem({"messages": [*chat[:2], {"role": "assistant", "content": r"\boxed{7}"}]}, "here")
    assert (answered.answer, answered.solution) == ("7", r"\boxed{7}")


def test_a_dotted_field_leads_into_an_object_or_its_json():
    for inner in ({"gt": "34"}, '{"gt": "34"}'):
        problem = as_problem({"q": "?", "answer": "0", "meta": inner}, "here", "question=q,answer=meta.gt")
        assert problem.answer == "34"
    with pytest.raises(SystemExit, match=r"here: field 'meta.no' is missing or empty; it has q, meta"):
        as_problem({"q": "?", "meta": {"gt": "34"}}, "here", "question=q,answer=meta.no")


# ---------------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------------
ROWS = [{"question": f"Wie groß ist {i}?", "answer": str(i)} for i in range(4)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("layout, solution", [
    ("AQuA", "r\n<answer>B</answer>"), ("MathQA", "r\n<answer>B</answer>"), ("GSM8K", "2+3=<<2+3=5>>5\n#### 5"),
    ("MATH", r"$3^2=\boxed{9}$."), ("MetaMath", "so\n#### 5\nThe answer is: 5")])
def test_a_worked_solution_ends_in_the_answer_and_is_right(layout, solution):
    """A teacher shows it as one that passed the check, and SFT trains on it."""
    problem = as_problem(LAYOUTS[layout][0], "here")
    assert problem.solution == solution and judge(problem, solution).reward == 1


def test_a_solution_of_a_choice_that_has_its_answer_is_not_changed():
    row = {"question": "?", "choices": ["p", "q"], "answer": 1, "solution": "So\n<answer>B</answer>"}
    assert as_problem(row, "here").solution == row["solution"]


def test_sets_that_list_the_right_option_first_do_not_show_it_first():
    """TruthfulQA does, and GPQA has it apart: answering A must not be right each time."""
    rows = [{"question": f"{i}?", "mc1_targets": {"choices": [f"yes {i}", f"no {i}"], "labels": [1, 0]}} for i in range(9)]
    rows += [{"question": f"{i}?", "correct_answer": f"yes {i}", "distractor1": f"no {i}"} for i in range(9)]
    problems = [as_problem(row, "here") for row in rows]
    for problem, row in zip(problems, rows):
        assert f"{problem.answer}: yes {row['question'][:-1]}\n" in problem.messages[0]["content"]
    assert {p.answer for p in problems[:9]} == {p.answer for p in problems[9:]} == {"A", "B"}


@pytest.mark.parametrize("name, data", [
    ("utf-8.jsonl", LINES.encode()), ("bom.jsonl", LINES.encode("utf-8-sig")), ("utf-16.jsonl", LINES.encode("utf-16")),
    ("gzip.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)), ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
    ("list.json", json.dumps(ROWS).encode()), ("object.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
    ("packed.json.gz", gzip.compress(json.dumps(ROWS, indent=1).encode("utf-16"), mtime=0)), ("table.parquet", None)])
def test_a_file_is_read_whatever_its_format_and_encoding(tmp_path, name, data):
    if data is None:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    problems = load_problems(f"jsonl:{tmp_path / name}")
    assert [(p.meta["question"], p.answer) for p in problems] == [(row["question"], row["answer"]) for row in ROWS]


def test_verls_parquet_is_read(tmp_path):
    second = {**VERL, "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2", "style": "rule"}}
    parquet.write_table(pyarrow.Table.from_pylist([VERL, second]), tmp_path / "train.parquet")
    task = load_task(f"parquet:{tmp_path}/train.parquet", heldout=0)
    assert sorted(p.answer for p in task.train) == ["2", "34"]


@pytest.mark.parametrize("data, message", [
    (gzip.compress(LINES.encode(), mtime=0)[:-9], "f: damaged gzip"), (b"PAR1" + b"\0" * 20, "f: damaged Parquet"),
    (LINES.encode("utf-16-le"), "f: neither JSON nor Parquet, .* iconv"), (b"[1, 2", "f: not JSON"),
    (b"\n\n[1,\n 2", "f, line 4: not JSON"), (b'{\n"a": [],\n "b": []}', "f: one JSON object with 2 lists"),
    (b"[" * 10**5, "f: its lists are nested too deeply"),
])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, data, message):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        load_problems(f"jsonl:{tmp_path}/f", bad_records="skip")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="is a folder; name a file in it"):
        load_problems(f"jsonl:{tmp_path}")


HUGE = "9" * 5000
CONTEST = {"question": "Add.", "starter_code": "", "solutions": ""}
BAD = {  # what is bad → a line of a file, and what is said of it
    "no JSON": (b'{"question": ', "not JSON"),
    "no object": (b"[1, 2]", "a record must be a JSON object, not list"),
    "latin-1": ('{"question": "Wie groß?", "answer": "1"}'.encode("latin-1"), "byte 0xdf at 21 is not UTF-8; convert the file"),
    "nested": (b'{"question": "?", "answer": ' + b"[" * 10**5, "its lists are nested too deeply"),
    "a lone surrogate": (b'{"question": "\\ud800?", "answer": "1"}', "field 'question' has half a character"),
    "a surrogate in the answer": (b'{"question": "?", "answer": "\\ud800"}', "field 'answer' has half a character"),
    "a surrogate in a chat": (b'{"prompt": [{"role": "system", "content": "\\udc00"}, {"role": "user", "content": "?"}], "answer": "1"}',
                              "field 'question' has half a character"),
    "a surrogate in a test": (json.dumps({**CONTEST, "input_output": {"inputs": ["\ud800"], "outputs": ["1"]}}).encode(), "half a character"),
    "no answer": (b'{"question": "?"}', "field 'answer' is missing or empty; it has question"),
    "an empty answer": (b'{"question": "?", "answer": ""}', "field 'answer' is missing or empty"),
    "an empty list": (b'{"question": "?", "final_answer": []}', "field 'answer' is missing or empty"),
    "lists in a list": (b'{"question": "?", "answer": [["1", "2"]]}', "field 'answer' must be a text, a number or a list"),
    "an object": (b'{"question": "?", "answer": {"value": 1}}', "field 'answer' must be a text, a number or a list"),
    "no text": (b'{"question": {"text": "?"}, "answer": "1"}', "field 'question' must be a text, or a list of messages"),
    "no user": (b'{"prompt": [{"role": "system", "content": "?"}], "answer": "1"}', "field 'question' must be a text, or a list"),
    "an image": (b'{"question": "?", "answer": "1", "image_1": {"bytes": "x"}}', "field 'image_1' has an image"),
    "an option that is none": (b'{"question": "?", "choices": ["a", "b"], "answer": 7}', "field 'answer' 7 is none of the options A, B"),
    "no right option": (b'{"question": "?", "choices": ["a", "b"]}', "field 'answer' is missing or empty"),
    "empty tests": (json.dumps({**CONTEST, "input_output": ""}).encode(), "its tests cannot be read .ValueError: field 'input_output' is empty"),
    "no tests": (json.dumps({**CONTEST, "input_output": '{"inputs": [], "outputs": []}'}).encode(), "0 inputs, 0 outputs"),
    "lists in a test": (json.dumps({**CONTEST, "input_output": '{"inputs": [[["1"]]], "outputs": ["1"]}'}).encode(), "a list in a list"),
    "a test that is no Python": (b'{"prompt": "?", "code": "def f(): pass", "test_list": ["assert f( == 1"]}', "its tests cannot be read .SyntaxError"),
    "a unittest": (b'{"prompt": "?", "entry_point": "f", "canonical_solution": "", "test": "class T: pass"}', "no function check"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_record_is_named_by_file_line_and_field_or_counted(tmp_path, what):
    line, message = BAD[what]
    (tmp_path / "f").write_bytes(b"\n".join([*LINES.encode().split(b"\n"), line]))
    spec = f"jsonl:{tmp_path}/f"
    with pytest.raises(BadRecord, match=f"^error: .*f, line 5: .*{message}") as error:
        load_task(spec, heldout=0)
    assert "\n" not in str(error.value)
    task = load_task(spec, heldout=0, bad_records="skip")
    assert len(task.train) == 4 and task.notes[0].startswith(f"{spec}: 1 of 5 records were left out")
    assert task.notes[1].startswith("  1 × ") and task.notes[1].endswith("line 5")


def test_integers_of_any_length_are_read(tmp_path):
    (tmp_path / "f").write_text(f'{{"question": "?", "answer": {HUGE}}}')
    [problem] = load_problems(f"jsonl:{tmp_path}/f")
    assert problem.answer == HUGE
    tests = f'{{"fn_name": "f", "inputs": [[{HUGE}]], "outputs": [[-{HUGE}]]}}'
    problem = as_problem({**CONTEST, "input_output": tests}, "here")
    assert problem.meta["tests"] == [f"assert as_lists(f(*[{HUGE}])) in [[-{HUGE}], -{HUGE}]"]


def test_ten_megabytes_in_a_line_are_read(tmp_path):
    (tmp_path / "f").write_text(json.dumps({"question": "word " * 2 * 10**6, "answer": "1"}))
    assert len(load_problems(f"jsonl:{tmp_path}/f")) == 1


def test_one_question_with_two_answers_is_refused_or_left_out(tmp_path):
    rows = [*ROWS, {**ROWS[1], "answer": "7"}, ROWS[2]]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, rows)))
    spec = f"jsonl:{tmp_path}/f"
    with pytest.raises(BadRecord, match=r"f, line 5: field 'answer' has '7', but the same question has '1' in .*f, line 2"):
        load_task(spec, heldout=0)
    task = load_task(spec, heldout=0, bad_records="skip")
    assert sorted(p.answer for p in task.train) == ["0", "2", "3"]
    assert task.notes[0].startswith(f"{spec}: 2 of 6 records were left out")


def test_records_of_the_hub_are_left_out_and_a_files_end_the_run_unless_a_flag_says_otherwise(monkeypatch, tmp_path, capsys):
    import datasets

    rows = [*ROWS, {"question": "?", "answer": None}, {"question": "!", "answer": ""}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr("common.tasks.records.check_hub", lambda *_: None)
    task = load_task("hf:a/b", heldout=0)
    assert len(task.train) == 4 and "2 of 6 records were left out" in task.notes[0] and "2 × field 'answer'" in task.notes[1]
    assert "record 5, record 6" in task.notes[1]
    assert len(load_problems("hf:a/b")) == 4 and "2 of 6 records were left out" in capsys.readouterr().out
    with pytest.raises(BadRecord, match="hf:a/b, record 5: field 'answer' is missing"):
        load_task("hf:a/b", heldout=0, bad_records="error")
    (tmp_path / "f").write_text(json.dumps({"question": "?"}))
    with pytest.raises(SystemExit, match=r"none of its 1 records can be used, the first is .*f, line 1: field 'answer'"):
        load_task(f"jsonl:{tmp_path}/f", heldout=0, bad_records="skip")


def test_what_was_read_is_told_with_three_examples(tmp_path):
    rows = [*ROWS, {"question": "A or B?", "answer": "B", "kind": "choice", "solution": "B it is"}]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, rows)))
    first, *examples = load_task(f"jsonl:{tmp_path}/f", heldout=1).summary
    assert first == f"jsonl:{tmp_path}/f: 4 problems to train on, 1 held out; 4 math, 1 choice; 1 with a worked solution" \
        or first.endswith("1 choice, 4 math; 1 with a worked solution")
    assert len(examples) == 3 and any("“Wie groß ist 1?”: answer “1”, no worked solution" in line for line in examples)


# ---------------------------------------------------------------------------------------------------------------------
# problems that cannot be judged
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def verifier():
    v = Verifier(workers=2, allow_unsafe_exec=not bubblewrap_works())
    yield v
    v.close()


MBPP = {"text": "Double x.", "code": "def f(x):\n    return 2 * x", "test_list": ["assert f(3) == 6"]}
UNFIT = {  # what cannot be judged → a record, and the reason
    "a gold": ({"question": "?", "answer": r"\boxed{}"}, r"boxed|empty"),
    "calls": ({"question": "?", "answer": "search", "kind": "tool"}, "not a list of calls"),
    "a wrong solution": ({**MBPP, "test_list": ["assert f(3) == 7"]}, r"its own solution fails: f\(3\) returned 6"),
    "an object": ({**MBPP, "code": "from fractions import Fraction\ndef f(x):\n    return Fraction(x)",
                   "test_list": ["assert f(3) == 3"]}, "its own solution fails"),
    "set-up code": ({**MBPP, "test_setup_code": "import numpy", "test_list": ["assert f(3) == 6"]}, "its own solution fails: The program does not run"),
    "a package": ({**MBPP, "text": "Twice x.", "test_imports": ["import pandas"]}, "No module named 'pandas'"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_problem_that_cannot_be_judged_is_named_or_left_out_at_start(tmp_path, verifier, what):
    record, reason = UNFIT[what]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, [*ROWS, MBPP, record])))
    spec = f"jsonl:{tmp_path}/f"
    task = load_task(spec, heldout=1)
    bad = verifier.unusable(task.at_hand)
    with pytest.raises(SystemExit, match=f"error: 1 problems cannot be judged, the first is .*f, line 6: .*({reason})") as error:
        task.without(bad)
    assert "\n" not in str(error.value)
    task = load_task(spec, heldout=1, bad_records="skip")
    left = task.without(verifier.unusable(task.at_hand))
    assert len(left.at_hand) == 5 and left.notes[-1].endswith(": line 6")


def test_nothing_is_left_out_of_problems_that_can_be_judged(tmp_path, verifier):
    (tmp_path / "f").write_text("\n".join(map(json.dumps, [*ROWS, MBPP])))
    task = load_task(f"jsonl:{tmp_path}/f", heldout=1)
    assert verifier.unusable(task.at_hand) == [] and task.without([]) is task


# ---------------------------------------------------------------------------------------------------------------------
# tests of code
# ---------------------------------------------------------------------------------------------------------------------
CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PICKLED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES)))).decode()
LCB = {"question_content": "Add.", "starter_code": "", "metadata": "{}", "public_test_cases": json.dumps(CASES),
       "private_test_cases": PICKLED, "contest_date": "2025-01-04T00:00:00", "platform": "atcoder"}
SCRIPT = ["assert words(script('1 2\\n')) == words('3\\n')"]


@pytest.mark.parametrize("record, tests", [
    (LCB, SCRIPT * 2),
    ({**CONTEST, "input_output": '{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}'}, SCRIPT),
    ({**CONTEST, "input_output": {"inputs": ["1 2\n"], "outputs": ["3\n"]}, "solutions": '["print(3)"]'}, SCRIPT),
    ({"prompt": [{"role": "user", "content": "Add."}], "data_source": "taco",
      "reward_model": {"ground_truth": '{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}', "style": "rule"}}, SCRIPT),
    ({"problem": "Add.", "tests": json.dumps(CASES)}, SCRIPT),
    ({"question": "Add.", "inputs": '["1 2\\n"]', "outputs": '["3\\n"]', "starter_code": ""}, SCRIPT),
    ({"description": "Add.", "official_tests": CASES}, SCRIPT),
    ({"prompt": "Add.", "verification_info": json.dumps({"language": "python", "test_cases": CASES})}, SCRIPT),
    ({"description": "Add.", "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
      "private_tests": {"input": [], "output": []}, "generated_tests": {"input": ["1 2\n"], "output": ["3\n"]},
      "solutions": {"language": [3], "solution": ["print(3)"]}}, SCRIPT * 2),
    ({**CONTEST, "input_output": '{"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}'},
     ["assert as_lists(f(*[1, [2]])) in [[3], 3]"]),
    ({**LCB, "metadata": '{"func_name": "f"}', "public_test_cases": '[{"input": "1\\n[2]", "output": "3"}]',
      "private_test_cases": "[]"}, ["assert as_lists(f(*[1, [2]])) in [3]"]),
])
def test_tests_of_contests_are_read_from_each_layout(record, tests):
    problem = as_problem(record, "here")
    assert problem.kind == "code" and problem.meta["tests"] == tests and "Add." in problem.messages[-1]["content"]
