"""The table of samples in a run's page: which rows, and that whatever a policy says stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from experiments.sample_table import LONGEST, sample_table
from tests.unit.experiments.test_report import page, write_run


def written(folder: Path, samples: list[dict[str, Any]], beside: str = "") -> Path:
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines + beside)
    return folder


def sample(step: int, kind: str = "train", response: str = "3", i: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "step": step,
        "tick": 2 * step,
        "problem": i,
        "sample": 0,
        "prompt": "1+2=",
        "response": response,
        "reward": 0.5,
        "length": 2,
        "truncated": False,
    } | more


class Seen(HTMLParser):
    """The tags of a page, and the text of the cells with answers."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.said: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag == "div" or (self._inside and tag != "td")
        self.said += [""] * (tag == "div")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "div"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.said[-1] += data


def test_markup_in_an_answer_is_text_and_no_script_but_the_pages_own_may_run(tmp_path: Path):
    bad = "<script>alert(1)</script><b>\"'&amp;</b></div></td><img src=x onerror=alert(2)>"
    plain = page([written(write_run(tmp_path / "plain"), [sample(1, parts={"a": 1.0})])], tmp_path / "1")
    folder = written(write_run(tmp_path / "bad"), [sample(1, response=bad, prompt=bad, parts={bad: 1.0})])
    html = page([folder], tmp_path / "2")
    seen = Seen(html)
    assert seen.tags == Seen(plain).tags and seen.tags.count("script") == 1
    assert [text for text in seen.said if text][-2:] == [bad, bad]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "innerHTML" not in script and set(re.findall(r"https?://[^\s\"'<)]*", html)) == {
        "http://www.w3.org/2000/svg"
    }


def test_rows_are_of_the_last_and_the_first_validation_and_of_the_newest_steps(tmp_path: Path):
    samples = [sample(step, "val", i=i) for step in (0, 4, 8) for i in range(5)]
    samples += [sample(step, i=i) for step in range(1, 9) for i in range(2)]
    table = sample_table(written(tmp_path, sorted(samples, key=lambda s: s["step"])), 15)
    assert table and table.there == len(samples) and len(table.rows) == 15
    assert [row.step for row in table.rows] == sorted((row.step for row in table.rows), reverse=True)
    assert [row.step for row in table.rows if row.kind == "val"] == [8] * 5 + [0] * 5
    assert [row.step for row in table.rows if row.kind == "train"] == [8, 8, 7, 7, 6]
    few = sample_table(tmp_path, 6)
    assert (
        few and [(row.step, row.kind) for row in few.rows] == [(8, "val")] * 2 + [(8, "train")] * 2 + [(0, "val")] * 2
    )


def test_long_texts_parts_and_lines_that_are_no_samples(tmp_path: Path):
    others = '[1]\n{"kind": "train", "step": 1}\n' + json.dumps(sample(1) | {"step": "1"}) + '\n{"kind": "tra'
    long = sample(2, response="a" * (LONGEST + 7), truncated=True, parts={"format": 0.25, "right": 1.0})
    table = sample_table(written(tmp_path, [long], others))
    assert table and table.there == 1
    (row,) = table.rows
    assert row.response == "a" * LONGEST + " … (7 characters more in samples.jsonl)"
    assert (row.parts, row.truncated) == (("format 0.25", "right 1"), True)
    assert sample_table(tmp_path / "nowhere") is None


def test_a_page_without_samples_has_no_script_and_runs_share_the_rows_of_a_page(tmp_path: Path):
    assert "<script" not in page([write_run(tmp_path / "none")], tmp_path / "1")
    folders = [
        written(write_run(tmp_path / str(seed), seed=seed), [sample(1, i=i) for i in range(200)]) for seed in range(3)
    ]
    html = page(folders, tmp_path / "2")
    assert html.count("<tr data-kind") == 240 and html.count('<section class="samples">') == 3
    assert html.count("80 of the 200 in samples.jsonl") == 3
