"""Answers are compared as what they are: numbers exactly, text as text, formulas as formulas, never by a part."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.answers import final_answer, is_number, normal, same
from rl.data_rows import DataRows
from rl.examples import Example
from rl.symbolic import Formulas, comparable
from rl.table import Table
from rl.task_config import TableParams, TaskConfig
from rl.tasks import make_task

BIG = "9007199254740993"  # 2**53 + 1: no float
SUM = r"\frac{x^2-1}{x-1}"
PAIRS = {  # kind: (gold, responses that are right, responses that are wrong)
    "integer": [
        ("72", ["#### 72", "It is 72.", "72", "#### **72**", "#### $72$", r"so \boxed{72}", "6*12=72", "#### 72.0"],
               ["#### 7", "#### 2", "#### 27", "72 or 73", "####", "#### 7 2", "#### 72!", "#### 60+12"]),
        ("48/2 = 24 <<48/2=24>>24\n#### 24", ["#### 24", "24 clips", "#### 24 clips, not 48", "#### 24 (clips)", "#### 24\nI am sure."], ["#### 48", "#### 12"]),
    ],
    "signed": [
        ("-5", ["#### −5", "#### -5", "the result is −5.", "#### - 5", "#### –5"], ["#### 5", "#### 10-5", "5"]),
        ("5", ["#### +5", "+5"], ["#### −5", "#### -5", "it is −5"]),
    ],
    "decimal": [
        (".5", ["#### 0.5", "#### .50", "about .5"], ["#### 5", "5", "#### 0.05", "#### 0,5"]),
        ("5.", ["#### 5", "#### 5.0"], ["#### .5", "#### 50"]),
        ("0.333333", ["#### 0.3333330"], ["#### 1/3", "#### 0.3333333"]),
        ("3.0e8", ["#### 300000000", r"#### $3\times 10^8$", "#### 3E8"], ["#### 3.08", "#### 3", "#### 10^8"]),
    ],
    "thousands": [
        ("1,234", ["#### 1234", "#### $1,234", r"#### 1{,}234", "so 1,234."], ["#### 1, 234", "#### 1", "#### 234", "#### 12,34"]),
        ("1000000", ["#### 1,000,000"], ["#### 1,000", "#### 1000,000"]),
    ],
    "currency": [
        ("-$5", ["#### $-5", "#### -5", "#### −$5", r"#### -\$5"], ["#### 5", "#### $5", "#### -€5"]),
        ("£2.50", ["#### 2.5", "#### 2.50£", "#### £2.5"], ["#### $2.50", "#### 250", "#### 2"]),
    ],
    "percent": [
        ("50%", ["#### 50", r"#### 50\%", "#### 0.5", "50 %"], ["#### 5", "#### 0.05", "#### $50", "#### 5000%"]),
        ("0.125", ["#### 12.5%"], ["#### 125%", "#### 12.5"]),
    ],
    "big integer": [
        (BIG, [f"#### {BIG}", f"#### {int(BIG):,}", f"#### {BIG}.0"], ["#### 9007199254740992", "#### 9007199254740994"]),
        ("9" * 60, ["#### " + "9" * 60], ["#### 1" + "0" * 60, "#### " + "9" * 59 + "8"]),
    ],
    "fraction": [
        ("1/2", ["#### 1/2", "#### 0.5", r"#### \frac{1}{2}", "#### ½", "#### 2/4"], ["#### 1", "#### 2", "#### 1/3", "#### 12"]),
        ("1 1/2", ["#### 3/2", "#### 1½", r"#### 1\frac{1}{2}", "#### 1.5"], ["#### 11/2", "#### 1/2", "#### 1"]),
        ("2", ["#### 4/2"], ["#### 1/2", "it is 1/2", "#### 2/0"]),
    ],
    "latex fraction": [
        (r"\frac{3}{4}", [r"#### \frac{3}{4}", r"\boxed{\dfrac34}", "#### 3/4", "#### 0.75", r"#### $\frac{6}{8}$"],
                         ["#### 3", "#### 4", r"#### \frac{4}{3}", r"\boxed{\frac{3}{5}}", "#### 34"]),
        (r"We get $\boxed{-\frac{\pi}{2}}$.", [r"\boxed{-\frac{\pi}{2}}", r"\boxed{-\pi/2}", "#### -π/2"], [r"\boxed{\frac{\pi}{2}}", "#### -1.57"]),
    ],
    "tuple or interval": [
        ("(3, 4)", ["#### (3,4)", "(3, 4)", r"\boxed{(3, 4)}", r"#### $\left(3, 4\right)$", "#### (3.0, 4)"],
                   ["#### 3", "#### 4", "#### (4, 3)", "#### [3, 4]", "#### (3, 4, 5)", "#### 34"]),
        ("[0, 1)", ["#### [0,1)"], ["#### (0,1)", "#### [0,1]", "#### 0"]),
        (r"(-\infty, 2)", [r"#### $(-\infty,2)$"], ["#### 2", r"#### (-\infty, 2]"]),
        ("4", ["#### 4"], ["(3, 4)", "#### (3, 4)"]),
    ],
    "time": [
        ("10:30", ["#### 10:30", "10:30", "#### 10:30."], ["#### 10", "#### 30", "#### 10:31", "#### 1030", "#### 1/3"]),
        ("30", ["#### 30"], ["at 10:30", "#### 10:30"]),
        ("12:05 PM", ["#### 12:05 pm"], ["#### 12:05 am", "#### 12"]),
    ],
    "date": [
        ("2024-01-02", ["#### 2024-01-02"], ["#### 2024-02-01", "#### 2024", "#### 2021", "#### 2"]),
        ("10/12/2024", ["#### 10/12/2024"], ["#### 5/6/2024", "#### 12/10/2024", "#### 10"]),
        ("March 3, 2024", ["#### march 3, 2024"], ["#### March 4, 2024", "#### 3", "#### 2024"]),
        ("10", ["#### 10"], ["#### 10 March", "#### 10 am", "#### 10 million"]),
    ],
    "algebra": [
        ("2x+3", ["#### 2x + 3", "#### 3+2x", r"\boxed{2x+3}"], ["#### 2", "#### 3", "#### 2x", "#### 2x+4", "#### 23"]),
        ("x^2-1", ["#### (x-1)(x+1)", "#### x²-1", "#### x**2 - 1"], ["#### x^2+1", "#### x2-1", "#### 2"]),
        (SUM, ["#### x+1"], ["#### x-1"]),
        ("1.5-2x", ["#### -2x+1.5"], ["#### 1.5+2x"]),
        ("x=5", ["#### 5", "#### x = 5"], ["#### y=5", "#### x=6"]),
        ("3", ["#### x=3"], ["2x+3", "#### x+3", "#### 9=3"]),
    ],
    "root or power": [
        (r"2\sqrt{2}", [r"#### \sqrt{8}", r"#### $2\sqrt2$"], ["#### 2", "#### 4", "#### 2.83"]),
        ("100", ["#### 10²", "#### 10^2"], ["#### 102", r"\boxed{\sqrt{100}+1}", "#### 10"]),
        ("2", ["#### 2"], [r"it is \sqrt{2}", "#### 2^2", "#### 2²"]),
    ],
    "matrix": [
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"#### \begin{pmatrix}1\\\frac{4}{2}\end{pmatrix}"],
                                                  [r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}", "#### 1", "#### 2", "#### 12"]),
    ],
    "range or version": [
        ("5-10", ["#### 5-10", "#### 5–10"], ["#### 5", "#### -5", "#### 10"]),
        ("1.2.3", ["#### 1.2.3"], ["#### 1.2", "#### 1.23", "#### 3"]),
        ("1:2", ["#### 1:2", "#### 1 : 2"], ["#### 2:1", "#### 1", "#### 0.5"]),
    ],
    "set": [
        (r"\{1, 2\}", [r"#### \{2, 1\}", "#### {1,2}"], [r"#### \{1, 3\}", "#### 1", "#### {1, 2, 3}", "#### (1, 2)"]),
        ("{red, blue}", ["#### {blue, red}"], ["#### {red, green}", "#### red"]),
    ],
    "text or choice": [
        ("Paris", ["#### Paris", "#### paris.", r"\boxed{\text{Paris}}", '#### "Paris"'], ["#### London", "#### Paris or London", "####"]),
        ("(B)", ["#### B", "#### (b)", r"\boxed{\text{(B)}}"], ["#### A", "#### (A)", "#### AB"]),
        ("silent", ["#### silent"], ["#### listen"]),
        ("no", ["#### No"], ["#### on", "#### yes"]),
        ("3 and 4", ["#### 3 and 4"], ["#### 3", "#### 4", "#### 34"]),
    ],
    "unit": [
        (r"5\text{ cm}", ["#### 5", "#### 5 cm", r"#### $5\text{ cm}$"], ["#### 6 cm", "#### 5 kg", "#### 50"]),
        ("5 apples", ["#### 5", "#### 5 apples"], ["#### 5 pears", "#### 4 apples", "#### 5 apples, 2 pears"]),
        ("$12", ["#### 12 dollars", "#### 12 USD"], ["#### 12 euros", "#### 12 million"]),
        (r"90^\circ", ["#### 90", "#### 90°"], ["#### 9", "#### 90%"]),
    ],
    "empty": [
        ("", [], ["", "####", "#### 0", " ", r"\boxed{}"]),
        ("####", [], ["####", "", "#### 1"]),
        ("0", ["#### 0", "#### -0", "zero is 0"], ["", "####", "#### none"]),
    ],
    "unicode": [
        ("٤٢", ["#### 42"], ["#### 24"]),
        ("４２", ["#### 42", "#### ４２"], ["#### 4"]),
        ("42", ["#### \u200b42\u200f", "####\u00a042", "#### ４２"], ["#### ４"]),
        ("café", ["#### cafe\u0301"], ["#### cafe"]),
    ],
}  # fmt: skip
CASES = [
    pytest.param(gold, response, right, id=f"{kind}: {gold[-20:]} / {response[-20:]} / {'right' if right else 'wrong'}")
    for kind, golds in PAIRS.items()
    for gold, *both in golds
    for right, responses in zip((True, False), both)
    for response in responses
]


def table(**params) -> Table:
    rows = DataRows("rows", [{"prompt": f"p{i}", "answer": "1"} for i in range(100)])
    return Table(rows, None, TableParams(**params), 0)


@pytest.fixture(scope="module")
def auto() -> Table:
    return table()


def test_there_are_pairs_of_every_kind():
    assert len(CASES) >= 200 and len(PAIRS) >= 15


@pytest.mark.parametrize(("gold", "response", "right"), CASES)
def test_no_pair_is_misjudged(auto: Table, gold: str, response: str, right: bool):
    assert auto.score(Example("q", gold), response) == float(right)
    assert auto.formulas.take_undecided() == 0


def test_rows_of_a_file_are_judged_by_their_whole_answer(tmp_path: Path):
    golds = ["1/2", "(3, 4)", "10:30", r"\frac{3}{4}", "2024-01-02", BIG, "−5"]
    rows = [{"prompt": f"{gold} {i}", "answer": gold} for i in range(30) for gold in golds]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = make_task(TaskConfig(name=f"jsonl:{file}"), 0, 8)
    for i in range(60):
        example = task.example("train", i)
        assert task.score(example, f"#### {example.answer}") == 1.0
        assert task.score(example, "#### 2") == task.score(example, "####") == 0.0


# --- where an answer is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 #### 8 \n and 9", "8"), ("#### 1\n#### 2", "2"), ("####\n\n 3", "3"), ("#### ", ""),
        (r"\boxed{4}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{4} #### 5", "5"),
        (r"#### \boxed{5}", "5"), (r"\boxed{1} or \boxed{2", "1"), (r"\boxed{\{1\}}", r"\{1\}"), (r"{\boxed {6}}", "6"),
        (r"\boxed{a \} b}", r"a \} b"), ("  as it is ", "as it is"),
    ],
)  # fmt: skip
def test_an_answer_follows_the_last_mark_or_is_in_the_last_whole_box(text: str, answer: str):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5, then 42 km.", "42"), ("x=42", "42"), ("It costs $42.", "$42"), ("(about 42)", "42"), ("42 km²", "42"),
        ("72", "72"), ("no number", "no number"), ("at 10:30", "at 10:30"), ("so 2x+3", "so 2x+3"), ("2x", "2x"),
        (r"\frac{3}{4}", r"\frac{3}{4}"), ("(3, 4)", "(3, 4)"), ("it is 1/2", "it is 1/2"),
    ],
)  # fmt: skip
def test_without_either_it_is_the_last_number_if_that_is_a_whole_one(text: str, answer: str):
    assert final_answer(text, number=True) == answer


def test_the_mode_says_when_formulas_are_compared():
    gold, turned = Example("q", "2x+3"), "#### 3+2x"
    assert table().score(gold, turned) == table(answers="math").score(gold, turned) == 1.0
    assert table(answers="text").score(gold, turned) == 0.0
    listed = Example("q", "1, 2"), "#### 2, 1"
    assert (table().score(*listed), table(answers="math").score(*listed)) == (0.0, 1.0)


# --- what a policy may write -------------------------------------------------------------------


HOSTILE = [
    "9" * 5000, "1e999999999", "9^{9^{9^{9}}}", "9^9^9^9", "(9^{999999})", "99999999!", "((((((" * 50, "\\boxed{" * 20000,
    "\\frac{1}{" * 80, "{" * 20000, "[1," * 300 + "]" * 300, "a" * 100000, "(" + " " * 50000, "1," * 20000, "*" * 50000,
    "$" * 5001, "\ud800", "\x00", "1/0", "\\frac{1}{0}", "\\sqrt" * 60, "\\int_0^1 x^{x} dx", "x^{999}", "__import__('os')",
     "\\prod_{i=1}^{999} i", "\\text{" * 500,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:12] for text in HOSTILE])
@pytest.mark.timeout(60)
def test_no_text_raises_or_hangs(auto: Table, text: str):
    for gold in ("42", "x^2+1"):
        assert auto.score(Example("q", gold), text) == auto.score(Example("q", gold), f"#### {text}") == 0.0
    assert auto.score(Example("q", text), "#### 42") == 0.0


ANSWERS = st.text(st.sampled_from("0123456789.,-−+/%$€()[]{}\\frac^x=:# ½²eE٣ \n"), max_size=12) | st.text(max_size=12)


@settings(max_examples=400, deadline=None)
@given(ANSWERS, ANSWERS)
def test_comparison_is_symmetric_and_reflexive_but_for_the_empty(one: str, other: str):
    a, b = normal(final_answer(one)), normal(final_answer(other))
    assert same(a, b) == same(b, a)
    assert comparable(a, b, True) == comparable(b, a, True)
    assert same(a, a) == bool(a)
    assert isinstance(final_answer(one, number=True), str) and isinstance(is_number(one), bool)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["x", "y", "2", "3", "+", "-", "*", "/", "^", "(", ")", r"\frac{1}{x}", "="]), max_size=8)
)
def test_formulas_are_compared_alike_in_both_directions(parts: list[str]):
    one, other = normal("".join(parts)), "x+1"
    if comparable(one, other, True):
        assert FORMULAS.same(one, other) == FORMULAS.same(other, one)


FORMULAS = Formulas()


def test_what_the_library_is_not_done_with_is_counted_and_different(monkeypatch: pytest.MonkeyPatch):
    formulas = Formulas()
    assert formulas.same("x+1", "1+x")
    os.kill(formulas._child._process.pid, signal.SIGSTOP)
    monkeypatch.setattr("rl.symbolic.DEADLINE_S", 0.1)
    assert not formulas.same("x+1", "1+x")
    assert (formulas.take_undecided(), formulas.take_undecided()) == (1, 0)
    monkeypatch.undo()
    assert formulas.same("x+1", "1+x")  # in a new process
    assert not formulas.same("(x+1)^{999}", "x^2+1") and formulas.take_undecided() == 1  # too much for the CPU's time
