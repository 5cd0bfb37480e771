"""Where problems come from: splits share nothing, the order is a pure function, records say what they are."""
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tasks import Problem, chain, code, gym, load_problems, load_task, take
from common.tasks.chain import chain_problems
from common.tasks.kinds import as_problem
from common.tasks.maths import INSTRUCTION, judge
from common.tasks.mixtures import blend, mixture, overlap
from common.tasks.sets import SETS


def write(path, records, as_list=False) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)))
    return f"jsonl:{path}"


def sums(n: int, start: int = 0) -> list[dict]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + n)]


def questions(problems) -> list[str]:
    return [p.messages[-1]["content"] for p in problems]


# ---------------------------------------------------------------------------------------------------------------------
# order and splits
# ---------------------------------------------------------------------------------------------------------------------
@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_the_order_is_a_pure_function_of_seed_and_position(size, start, a, b, seed):
    problems = [Problem(str(i), []) for i in range(size)]
    assert take(problems, seed, start, a) + take(problems, seed, start + a, b) == take(problems, seed, start, a + b)
    epoch = take(problems, seed, size * 3, size)
    assert Counter(p.id for p in epoch) == Counter(p.id for p in problems)  # each once an epoch


@pytest.mark.parametrize("spec", ["chain", "chain:10", "jsonl"])
def test_train_and_heldout_share_no_question(spec, tmp_path):
    spec = write(tmp_path / "a.jsonl", sums(50) + sums(20)) if spec == "jsonl" else spec
    task = load_task(spec, heldout=16)
    assert len(task.heldout) == 16 and not set(questions(task.train)) & set(questions(task.heldout))
    assert len(set(questions(task.train))) == len(task.train)
    again = load_task(spec, heldout=16)
    assert questions(again.train) == questions(task.train) and questions(again.heldout) == questions(task.heldout)


def test_the_chain_task_is_as_it_ever_was():
    """A model is trained on it: the questions, their order and the split must not move."""
    task = load_task("chain", heldout=4)
    assert questions(chain_problems(3)) == ["Compute 11+39+12.", "Compute 78+64+97+24+51.", "Compute 41+16+68."]
    assert questions(task.heldout) == ["Compute 12+53+88.", "Compute 67+42+11+22.", "Compute 68+17+28+45+78.",
                                       "Compute 62+93+21+11."]
    assert len(task.train) == chain.SIZE and task.notes == ()


def test_too_few_problems_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="5 different problems, but 5 are to be held out; lower --heldout"):
        load_task(write(tmp_path / "a.jsonl", sums(5) * 2), heldout=5)
    with pytest.raises(SystemExit, match=r"unknown source 'nothing'; use chain, jsonl:PATH, .* livecodebench"):
        load_task("nothing", heldout=1)
    with pytest.raises(SystemExit, match="unknown source 'gsm8k'"):
        load_task("gsm8k:main", heldout=1)


# ---------------------------------------------------------------------------------------------------------------------
# mixtures and overlap
# ---------------------------------------------------------------------------------------------------------------------
def test_a_mixture_has_its_shares_in_training_and_heldout(tmp_path):
    a, b = write(tmp_path / "a+b.jsonl", sums(300)), write(tmp_path / "b.jsonl", sums(30, start=1000))
    task = load_task(f"4*{a}+1*{b}", heldout=10)
    is_b = [int(p.answer) >= 2000 for p in task.heldout]
    assert len(is_b) == 10 and sum(is_b) == 2
    trained = [int(p.answer) >= 2000 for p in task.train]
    assert abs(sum(trained) / len(trained) - 0.2) < 0.005 and len(set(questions(task.train))) == 292 + 28
    seen = [int(p.answer) >= 2000 for p in take(task.train, seed=0, start=0, count=len(task.train))]
    assert abs(sum(seen[:200]) / 200 - 0.2) < 0.1  # the stream is mixed, too
    assert not set(questions(task.train)) & set(questions(task.heldout))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=4))
def test_a_blend_keeps_every_problem_and_the_proportions(parts):
    lists = [[(k, i) for i in range(n)] for k, (_, n) in enumerate(parts)]
    mixed = blend([float(w) for w, _ in parts], lists)
    assert set(mixed) == {x for part in lists for x in part}
    scale = max(n / w for w, n in parts)
    for k, (w, _) in enumerate(parts):
        assert abs(sum(x[0] == k for x in mixed) - w * scale) <= 0.5 + 1e-9


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=4))
def test_every_beginning_of_a_blend_has_the_proportions(parts):
    """SD-Zero takes its phases from the front."""
    lists = [[k] * n for k, (_, n) in enumerate(parts)]
    mixed = blend([float(w) for w, _ in parts], lists)
    for k in range(len(parts)):
        share = mixed.count(k) / len(mixed)
        for end in range(1, len(mixed), 7):
            assert abs(mixed[:end].count(k) - share * end) <= len(parts)


@pytest.mark.parametrize("spec, parts", [
    ("gsm8k", [(1.0, "gsm8k")]), ("0.8*gsm8k+0.2*mbpp", [(0.8, "gsm8k"), (0.2, "mbpp")]),
    ("4*jsonl:a+b.jsonl + 1*hf:x/y:main@test", [(4.0, "jsonl:a+b.jsonl"), (1.0, "hf:x/y:main@test")]),
    ("jsonl:2*3.jsonl", [(1.0, "jsonl:2*3.jsonl")]), ("2*chain", [(2.0, "chain")])])
def test_the_syntax_of_mixtures(spec, parts):
    assert mixture(spec) == parts


LONG = "A farmer has seven fields and in each of them there are nine old trees that bear red apples"


def test_overlap_is_thirteen_words_in_a_row_whatever_their_case_and_punctuation():
    def problem(text):
        return Problem(text, [{"role": "user", "content": text}])

    words = LONG.split()
    same = problem("Today! " + ", ".join(words[3:16]).upper() + "?")
    short = problem(" ".join(words[3:15]) + " else")
    assert overlap([same, short], [problem(LONG)]) == [same]


def test_overlap_with_evaluation_sets_is_told_and_exact_copies_are_removed(tmp_path):
    records = [*sums(20), {"question": LONG + " in spring?", "answer": "63"},
               {"question": "Prove  it by  heart.", "answer": "1"}]
    spec = write(tmp_path / "train.jsonl", records)
    write(tmp_path / "math" / "math500.json", [{"problem": LONG + ". How many trees?", "answer": "63"},
                                               {"problem": "prove it by heart.", "answer": "1"}], as_list=True)
    task = load_task(spec, heldout=0, data_dir=str(tmp_path), against="math500")
    assert task.notes[1:] == ("1 of 21 training questions share 13 words in a row with math500",
                              "1 training questions were removed, for they are in an evaluation set")
    assert len(task.train) == 21
    assert load_task(spec, heldout=0, kind="math").notes == ()


def test_the_instruction_that_all_questions_share_is_no_overlap(tmp_path):
    spec = write(tmp_path / "a.jsonl", sums(30))
    assert len(INSTRUCTION.split()) > 11 and load_task(spec, heldout=5, kind="math").notes == ()


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------
def test_fields_are_found_by_their_usual_names_or_by_flag(tmp_path):
    p = as_problem({"problem": "1?", "answer": 27.0, "solution": "so"}, "here", "", None)
    assert (p.answer, p.solution, p.kind) == ("27", "so", "math")
    assert p.messages == [{"role": "user", "content": f"1?\n\n{INSTRUCTION}"}]
    p = as_problem({"q": "1?", "gold": "2", "prompt": "no", "system": "S"}, "here", "question=q,answer=gold", "Answer.")
    assert p.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "1?\n\nAnswer."}]
    assert as_problem({"question": " 1?", "answer": "2"}, "here", "", "").messages[0]["content"] == " 1?"


def test_an_answer_after_four_hashes_is_taken_apart():
    p = as_problem({"question": "?", "answer": "2+3=5\n5-1=4\n#### 4"}, "here", "", None)
    assert (p.answer, p.solution) == ("4", "2+3=5\n5-1=4\n#### 4")
    assert judge(p, p.solution).reward == 1  # what a teacher shows and SFT trains on ends in the answer


@pytest.mark.parametrize("line, message", [
    ('{"question": "x"}', "field 'answer' is missing or empty; it has question; name the fields with --fields"),
    ('{"question": " ", "answer": 1}', "field 'question' is missing or empty"), ("1", "must be a JSON object, not int"),
    ('{"question": ', "not JSON"), ('"text"', "must be a JSON object, not str"),
    ('{"prompt": "?", "code": "def f(): pass", "test_list": ["assert g() == 1"]}', "no test calls a function"),
    ('{"prompt": "?", "code": "def f(:", "test_list": ["assert f() == 1"]}', "its tests cannot be read .SyntaxError"),
    ('{"question": "?", "input_output": "{}"}', "its tests cannot be read .KeyError: 'inputs'"),
    ('{"question": "?", "input_output": "{\\"inputs\\": [1], \\"outputs\\": []}"}', "1 inputs, 0 outputs"),
])
def test_a_malformed_record_is_named_by_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(sums(1)[0]) + "\n\n" + line + "\n")
    with pytest.raises(SystemExit, match=message) as error:
        load_problems(f"jsonl:{path}")
    assert f"{path}, line 3" in str(error.value)


def test_files_may_be_lines_or_a_list_and_hold_any_character(tmp_path):
    records = [{"question": "a\u2028b\u0085c?", "answer": "1"}, {"question": "d", "answer": "2"}]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write(tmp_path / "list.json", records, as_list=True)
    first, second = load_problems(f"jsonl:{tmp_path}/lines.jsonl"), load_problems(f"json:{tmp_path}/list.json")
    assert questions(first) == questions(second) and len(first) == 2
    with pytest.raises(SystemExit, match="no such file"):
        load_problems("jsonl:/no/such/file")


def test_the_hub_out_of_reach_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=r"error: --task hf:nobody/nothing@test: .*; without the hub, give --data_dir"):
        load_problems("hf:nobody/nothing@test")


@pytest.mark.parametrize("fields, kind", [
    ({}, "math"), ({"kind": "algebra"}, "math"), ({"kind": ["mcq"]}, "math"), ({"kind": "math", "answerKey": "A"}, "math"),
    ({"kind": "choice"}, "choice"), ({"kind": "mcq"}, "choice"), ({"answerKey": "A"}, "choice"),
    ({"kind": "tool"}, "tool"), ({"kind": "tooluse"}, "tool"), ({"golden_answer": "[]"}, "tool"),
    ({"kind": "tool", "answerKey": "A"}, "tool")])
def test_a_record_states_its_kind_or_is_recognised_and_a_flag_overrides_both(fields, kind):
    record = {"question": "?", "answer": "A", **fields}
    assert as_problem(record, "here").kind == kind
    for stated in ("math", "choice", "tool"):
        assert as_problem(record, "here", kind=stated).kind == stated


def test_code_without_tests_is_refused_in_words():
    with pytest.raises(SystemExit, match=r"here: its tests cannot be read .ValueError: no field test_list, entry_point"):
        as_problem({"question": "?", "answer": "A"}, "here", kind="code")


def test_what_was_recognised_is_told_and_what_the_flag_states_is_not(tmp_path):
    spec = write(tmp_path / "a.jsonl", [*sums(3), {"question": "A: yes or B: no?", "answer": "A", "kind": "mcq"}])
    assert load_task(spec, heldout=1).notes in (
        (f"{spec}: read as 3 math, 1 choice; --kind states another kind",),
        (f"{spec}: read as 1 choice, 3 math; --kind states another kind",))
    stated = load_task(spec, heldout=1, kind="choice")
    assert stated.notes == () and {p.kind for p in stated.train} == {"choice"}


def test_references_that_only_the_same_text_answers_are_told_at_load(tmp_path):
    spec = write(tmp_path / "a.jsonl", [*sums(3), {"question": "Which law?", "answer": r"\forall x \exists y"}])
    notes = load_task(spec, heldout=1, kind="math").notes
    assert len(notes) == 1 and notes[0].startswith("1 of 4 reference answers are compared as text")


# ---------------------------------------------------------------------------------------------------------------------
# named sets, from a folder
# ---------------------------------------------------------------------------------------------------------------------
MBPP = [dict(task_id=i, prompt=f"Add {i}.", code=f"def f(x):\n    return x + {i}", test_imports=[],
             test_list=[f"assert f(1) == {i + 1}"]) for i in (5, 11, 510, 511, 600, 601, 974)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train", 9), ("test", 4)):
        write(root / f"gsm8k/{split}.jsonl", [
            {"question": f"{split} {i}?", "answer": f"so\n#### {i}"} for i in range(n)])
        write(root / f"sciknoweval/physics/{split}.json", [
            dict(kind="mcq", prompt=f"{split} {i}\n\nA: yes\nB: no", answer="B", system="Choose.") for i in range(n)])
        write(root / f"toolalpaca/{split}.json", [
            dict(kind="tooluse", prompt=f"{split} {i}", answer='[{"Action": "a", "Action_Input": "{}"}]')
            for i in range(n)])
    write(root / "math/math500.json", [{"problem": f"{i}?", "answer": str(i), "solution": "s"} for i in range(6)], True)
    for name in ("aime24", "aime25"):
        write(root / f"{name}/test.jsonl", [{"problem": f"{name} {i}?", "answer": f"0{i}"} for i in range(3)])
    write(root / "mbpp/sanitized-mbpp.json", MBPP, True)
    write(root / "humaneval/HumanEval.jsonl", [
        dict(task_id="0", prompt="def f(x):\n", canonical_solution="    return 1\n", entry_point="f",
             test="def check(c):\n    assert c(0) == 1\n")])
    case = json.dumps([{"input": "1", "output": "1"}])
    write(root / "livecodebench/test.jsonl", [
        dict(question_content=day, starter_code="", metadata="{}", public_test_cases=case, private_test_cases=case,
             contest_date=day) for day in ("2025-01-31T00:00:00", "2025-02-01T00:00:00", "2025-04-30", "2025-05-01")])
    return str(root)


@pytest.mark.parametrize("spec, train, test, verifier", [
    ("gsm8k", 9, 4, "math"), ("math500", 6, 6, "math"), ("aime24", 3, 3, "math"), ("aime25", 3, 3, "math"),
    ("sciknoweval/physics", 9, 4, "choice"), ("toolalpaca", 9, 4, "tool"), ("mbpp", 2, 2, "code"),
    ("humaneval", 1, 1, "code"), ("livecodebench", 4, 4, "code"),
    ("livecodebench/2025-02-01..2025-05-01", 2, 2, "code")])
def test_every_named_set_reads_from_a_folder(folder, spec, train, test, verifier):
    assert spec.partition("/")[0] in SETS
    for split, count in (("train", train), ("test", test)):
        problems = load_problems(spec, split, data_dir=folder)
        assert len(problems) == count and {p.kind for p in problems} == {verifier}
        assert all(code.INSTRUCTION in q for q in questions(problems)) == (verifier == "code")


def test_a_set_with_a_test_split_holds_out_of_it_and_one_without_divides_itself(folder):
    task = load_task("gsm8k", heldout=3, data_dir=folder)
    assert len(task.train) == 9 and {p.meta["question"].split()[0] for p in task.heldout} == {"test"}
    task = load_task("math500", heldout=2, data_dir=folder)
    assert (len(task.train), len(task.heldout)) == (4, 2)
    assert [p.meta["question"] for p in load_task("mbpp", heldout=1, data_dir=folder).train] in (
        ["Add 601.", "Add 974."], ["Add 974.", "Add 601."])
    small = load_task("gsm8k", heldout=5, data_dir=folder)
    assert len(small.heldout) == 4 and small.notes == ("gsm8k: its test split has 4 problems, not 5",)
    with pytest.raises(SystemExit, match="--task math500: 6 different problems, but 6 are to be held out"):
        load_task("math500", heldout=6, data_dir=folder)
    with pytest.raises(SystemExit, match="name the subject too"):
        load_task("sciknoweval", heldout=1, data_dir=folder)
    with pytest.raises(SystemExit, match=r"no such file: .*sciknoweval/alchemy/train.json"):
        load_task("sciknoweval/alchemy", heldout=1, data_dir=folder)


def test_records_of_the_hub_are_read_too(monkeypatch):
    """SciKnowEval and ToolAlpaca stand there in other words than in SDPO's files."""
    import datasets

    choices = {"label": ["A", "B"], "text": ["yes", "no"]}
    pool = [dict(question=f"Q{i}", choices=choices, answerKey="A", type="mcq-2-choices", domain="Physics",
                 details={"level": "L3"}) for i in range(100)]
    pool += [{**pool[0], "question": "other", "domain": "Biology"},
             {**pool[0], "question": "L1", "details": {"level": "L1"}}]
    tools = [dict(prompt="?", golden_answer=[{"Action": "a", "Action_Input": "{}"}])]
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return {"hicai-zju/SciKnowEval": pool, "Ahren09/ToolAlpaca": tools}[path]

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, test = (load_problems("sciknoweval/physics", split) for split in ("train", "test"))
    assert len(train) + len(test) == 100 and 3 <= len(test) <= 20 and not set(questions(train)) & set(questions(test))
    assert questions(train)[0].startswith("Q0\n\nA: yes\nB: no\n") and train[0].answer == "A"
    [tool] = load_problems("toolalpaca", "test")
    assert tool.kind == "tool" and json.loads(tool.answer) == tools[0]["golden_answer"]
    assert asked == [("hicai-zju/SciKnowEval", "v2", "test")] * 2 + [("Ahren09/ToolAlpaca", None, "test")]


def test_any_generated_dataset_has_its_own_instruction():
    p = load_task("gym:leg_counting", heldout=2).heldout[0]
    assert p.kind == "gym" and p.messages[0]["content"].endswith("between <answer> and </answer>.")
    for name, words in (("nothing", "not registered"), ("", "not registered"), ("composite", "Must specify at least one")):
        with pytest.raises(SystemExit, match=f"^error: --task gym:{name}: .*{words}"):
            load_task(f"gym:{name}", heldout=1)


def test_an_instruction_replaces_the_one_of_a_generated_dataset():
    task = load_task("gym:leg_counting", heldout=1, instruction="Say <answer>N</answer>.")
    for p in (task.heldout[0], task.train[0]):
        assert p.messages[0]["content"] == f"{p.meta['question']}\n\nSay <answer>N</answer>."
    bare = load_task("gym:leg_counting", heldout=1, instruction="").heldout[0]
    assert bare.messages[0]["content"] == bare.meta["question"]


@pytest.mark.parametrize("spec, option, value", [
    ("chain", "fields", "question=q"), ("chain", "kind", "math"), ("chain", "bad_records", "skip"), ("chain", "gym_reward", "score"),
    ("chain", "instruction", "Box it."), ("gym:leg_counting", "kind", "math"), ("gym:leg_counting", "fields", "question=q"),
    ("gym:leg_counting", "bad_records", "error"), ("jsonl:SUMS", "gym_reward", "score"), ("math500", "kind", "choice"),
    ("2*chain+1*gym:leg_counting", "kind", "code")])
def test_an_option_that_the_task_does_not_read_is_refused(spec, option, value, tmp_path):
    spec = spec.replace("jsonl:SUMS", write(tmp_path / "sums.jsonl", sums(5)))
    write(tmp_path / "math" / "math500.json", [{"problem": f"{i}?", "answer": "1"} for i in range(5)], as_list=True)
    with pytest.raises(SystemExit, match=f"^error: --task .*: --{option} changes nothing here; leave it out"):
        load_task(spec, heldout=2, data_dir=str(tmp_path), **{option: value})


def test_an_option_that_one_part_of_a_mixture_reads_is_taken(tmp_path):
    spec = write(tmp_path / "sums.jsonl", sums(5))
    task = load_task(f"1*chain+1*{spec}", heldout=2, instruction="Box it.", kind="math", bad_records="skip")
    assert {(p.kind, p.messages[0]["content"].endswith("Box it.")) for p in task.at_hand} == {("chain", False), ("math", True)}
    load_task("1*chain+1*gym:leg_counting", heldout=2, gym_reward="score", instruction="Tag it.")


@pytest.mark.parametrize("given, shown", [
    ("so", "so"), (["so", "or so"], "so"), ([], None), (None, None)])
def test_of_several_solutions_the_first_is_shown_as_text(given, shown):
    p = as_problem({"problem": "1?", "answer": "27", "ways": given}, "here", "solution=ways", None)
    assert p.solution == shown


@pytest.mark.parametrize("given", [{"text": "so"}, [{"text": "so"}], [["so"]], 3])
def test_a_solution_that_is_no_text_is_refused_in_words(given):
    with pytest.raises(SystemExit, match="here: field 'ways' must be a text or a list of texts"):
        as_problem({"problem": "1?", "answer": "27", "ways": given}, "here", "solution=ways", None)


# ---------------------------------------------------------------------------------------------------------------------
# generated problems
# ---------------------------------------------------------------------------------------------------------------------
SCORERS = {  # what a made-up scorer pays for (answer, the right one, the answer of another problem)
    "exact": lambda text, right: float(text == right),
    "a floor": lambda text, right: 1.0 if text == right else 0.01,
    "partial": lambda text, right: 1.0 if text == right else 0.9 if text.isdecimal() and text != "0" else 0.0,
    "a little": lambda text, right: 1.0 if text == right else 0.2 if text.isdecimal() and text != "0" else 0.0,
    "anything": lambda text, right: float(text != ""),
    "empty": lambda text, right: float(text in ("", right)),
    "others": lambda text, right: float(text.isdecimal() and text != "0"),
    "nothing": lambda text, right: 0.5,
    "broken": lambda text, right: 1 / (text == right),
}


@pytest.fixture
def made_up(monkeypatch):
    """gym.ask without a process: problem i asks for i + 7; SCORERS score. It counts the problems that it made."""
    made = []

    def ask(kind, name, *request, number=0):
        if kind == gym.SCORE:
            answer, entry = request
            try:
                return SCORERS[name](answer, entry["answer"])
            except ArithmeticError as error:
                raise gym.Unmade("ZeroDivisionError") from error
        _, seed, index = request
        made.append((seed, index))
        number = index + seed // gym.STRIDE
        number = number % 3 if name == "few" else number
        return {"question": f"{number} + 7?", "answer": None if name == "open" else str(number + 7)}

    monkeypatch.setitem(SCORERS, "few", SCORERS["exact"])
    monkeypatch.setitem(SCORERS, "open", lambda text, right: 0.0)
    monkeypatch.setattr(gym, "ask", ask)
    return made


@pytest.mark.parametrize("name, reward, floor, words", [
    ("exact", "score", 0, None), ("a floor", "score", 0.01, "pays up to 0.01 for an empty or wrong answer"),
    ("a floor", "full", 0.01, None), ("partial", "score", 0.9, "pays up to 0.9 for an empty or wrong answer"),
    ("a little", "score", 0, "pays up to 0.2 for the answer of another problem; --gym_reward full pays right answers alone"),
    ("broken", "score", 0, None), ("open", "score", 0, None)])
def test_what_a_scorer_pays_for_nonsense_counts_as_nothing_and_is_told(made_up, name, reward, floor, words):
    task = load_task(f"gym:{name}", heldout=5, gym_reward=reward)
    meta = task.heldout[0].meta
    assert (meta["reward"], meta["floor"]) == (reward, floor)
    assert task.notes == () if words is None else words in task.notes[0]
    assert name != "open" or (task.heldout[0].answer is None and task.train[0].answer is None)


@pytest.mark.parametrize("name, words", [
    ("anything", "its scorer pays 'zzz' in full"), ("empty", "its scorer pays '' in full"),
    ("others", "its scorer pays the answers of other problems in full"), ("nothing", "its scorer pays 0.5 for the set's own answer")])
def test_a_scorer_that_pays_wrong_answers_is_refused(made_up, name, words):
    with pytest.raises(SystemExit, match=f"error: --task gym:{name}: {words}"):
        load_task(f"gym:{name}", heldout=5)


@pytest.mark.parametrize("paid, full, score", [(1.0, 1, 1), (0.95, 0, 0.95), (0.01, 0, 0), (float("nan"), 0, 0), (2.0, 1, 1), (-1.0, 0, 0)])
def test_a_partial_score_is_paid_only_if_a_flag_says_so(monkeypatch, paid, full, score):
    monkeypatch.setattr(gym.gym_maker, "score", lambda *_: paid)
    for reward, right in (("full", full), ("score", score)):
        problem = Problem("p", [], kind="gym", meta={"gym": "x", "entry": {}, "reward": reward, "floor": 0.01})
        assert gym.judge(problem, "<answer>7</answer>").reward == right


def test_generated_problems_are_made_as_they_are_needed_and_none_is_held_out_too(made_up):
    task = load_task("gym:exact", heldout=50)
    assert len(task.train) == gym.SIZE and len(task.heldout) == 50 and len(made_up) < 60
    first = take(task.train, seed=1, start=0, count=20)
    assert len(made_up) < 90 and not set(questions(first)) & set(questions(task.heldout))
    again = load_task("gym:exact", heldout=50)  # a resume, another rank: other problems are asked for first
    later = take(again.train, seed=1, start=10, count=10)
    assert later == first[10:] and again.heldout[7:9] == task.heldout[7:9]
    assert len(task.at_hand) < 90


def test_a_training_problem_that_is_held_out_gives_way_to_another(made_up):
    task = load_task("gym:few", heldout=0)
    assert {p.answer for p in task.train[:50]} == {"7", "8", "9"}
    with pytest.raises(SystemExit, match="gym:few: it has too few different questions, for 100 in a row are held out; lower --heldout"):
        load_task("gym:few", heldout=50)
    task = load_task("gym:few", heldout=1)
    assert len({p.answer for p in task.train[:50]}) == 2 and task.heldout[0].answer not in {p.answer for p in task.train[:50]}


def test_a_mixture_with_a_generated_set_makes_no_more_than_it_needs(made_up, tmp_path):
    spec = f"1*gym:exact+1*{write(tmp_path / 'a.jsonl', sums(300))}"
    task = load_task(spec, heldout=20)
    seen = take(task.train, seed=0, start=0, count=40)
    assert {p.kind for p in seen} == {"gym", "math"} and len(made_up) < 90
    assert [p.kind for p in task.heldout] == ["gym"] * 10 + ["math"] * 10
    assert sum(p.kind == "math" for p in task.at_hand) == 300


def test_a_generated_problem_is_the_same_in_every_process():
    """These sets walk over Python sets of texts, which each process orders in its own way."""
    for name in ("ransom_note", "isomorphic_strings"):
        once = [gym.problem(name, i, 100) for i in (0, 3)]
        gym.maker.cache_clear()
        again = [gym.problem(name, i, 100) for i in (3, 0)][::-1]
        assert once == again
