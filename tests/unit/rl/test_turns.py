"""Conversations: turns behind one another by tokens, an environment between them, and where they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deploy.config import ConfigError, load
from rl.calculator_task import Calculator
from rl.engine import Key, Samples
from rl.environment import EnvironmentFailed, OwnEnvironment
from rl.examples import Example
from rl.messages import Message
from rl.model_files import BUILTIN
from rl.prompts import PromptEncoder
from rl.task_config import TaskConfig
from rl.turns import Conversations, conversation_id
from tests.unit.rl.test_stops import CHATML, LLAMA3, MISTRAL, SPECIAL

CHARACTERS = ["\n", *map(chr, range(32, 127))]
TEMPLATES = {
    "chatml": CHATML,
    "llama 3": LLAMA3 + "{% if add_generation_prompt %}<s>assistant\n\n{% endif %}",
    "mistral": MISTRAL,
    "space before the end": CHATML.replace("<|im_end|>\n", "  \n<|end|><|endoftext|>"),
    "no end": CHATML.replace("<|im_end|>", ""),
}
VOCAB = len(CHARACTERS) + len(SPECIAL)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and those of templates."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*CHARACTERS, *SPECIAL])}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=SPECIAL)


def encoder_of(tokenizer: PreTrainedTokenizerFast, folder: Path, **task: Any) -> PromptEncoder:
    config = json.loads((BUILTIN / "tiny" / "config.json").read_text()) | {"vocab_size": VOCAB}
    (folder / "config.json").write_text(json.dumps(config))
    return PromptEncoder(folder, TaskConfig(**task), 99, tokenizer)


# --- tokens behind a turn ----------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_prompt_turn_and_what_comes_behind_it_are_the_templates_tokens_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
):
    tokenizer.chat_template = template
    encoder = encoder_of(tokenizer, tmp_path, chat=True, stop=["?"])
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}]
    said = [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "more"}]
    (prompt,) = encoder.encode([chat])
    for words in ("a1", "a1?"):
        said[0]["content"] = words
        whole = tokenizer.apply_chat_template([*chat, *said], add_generation_prompt=True, return_dict=False)
        turn = tokenizer((" " if template == MISTRAL else "") + words, add_special_tokens=False)["input_ids"]
        if words == "a1" and encoder._end:
            padding = "  \n" if "  \n" in template else ""  # of the template, which a policy need not say
            turn += tokenizer(padding + encoder._end, add_special_tokens=False)["input_ids"]
        elif words == "a1":
            turn += [tokenizer.eos_token_id]
            at = len(prompt) + len(turn) - 1
            whole = [*whole[:at], tokenizer.eos_token_id, *whole[at:]]
        assert [*prompt, *turn, *encoder.continuation(said[1:], turn[-1])] == whole


def test_without_a_template_it_is_the_text_and_nothing_that_a_tokenizer_puts_around_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    found = encoder_of(tokenizer, tmp_path).continuation([{"role": "tool", "content": "7"}], 0)
    assert tokenizer.decode(found) == "7"


@pytest.mark.parametrize("text", ["é", ""])
def test_a_text_that_cannot_be_said_ends_no_turn(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str):
    assert encoder_of(tokenizer, tmp_path).stops is None and encoder_of(tokenizer, tmp_path, stop=["</x>"]).stops
    with pytest.raises(ValueError, match=f"task.stop '{text}': the model's tokenizer makes '.*' of it"):
        _ = encoder_of(tokenizer, tmp_path, stop=["?", text]).stops


# --- conversations -----------------------------------------------------------------------------


class Scripted:
    """An engine that says what it is told to; `asked` is all that it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, turns: list[list[str]]):
        self.tokenizer, self.turns, self.asked = tokenizer, turns, []

    def sample(self, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float):
        said = self.turns[len(self.asked)]
        self.asked.append(([self.tokenizer.decode(p) for p in prompts], keys, max_new))
        tokens = [np.array(self.tokenizer(text)["input_ids"], np.int32) for text in said]
        numbers = [np.arange(len(t), dtype=np.float32) - 10 * len(self.asked) for t in tokens]
        return Samples(tokens, numbers, [text.endswith("~") for text in said])


class Echo:
    """Answers a turn with what it said, between brackets, until it says `.`."""

    def __init__(self, *replies: Any):
        self.replies, self.seen = replies, []

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> Any:
        self.seen.append((messages, metadata))
        said = messages[-1]["content"]
        if self.replies:
            return self.replies[0]
        return None if said.endswith(".") else [{"role": "tool", "content": f"[{said}]"}]


def hold(tokenizer: PreTrainedTokenizerFast, folder: Path, turns: list[list[str]], environment: Echo, limit=40, most=3):
    engine = Scripted(tokenizer, turns)
    talks = Conversations(engine, encoder_of(tokenizer, folder), environment, most)  # pyright: ignore[reportArgumentType]
    examples = [Example("p", "1", {"row": 1}), Example("q", "2", {"row": 2})]
    prompts = [talks.encoder.encode([e.prompt])[0] for e in examples]
    keys = [(0, 0, 1, i, s) for i in range(2) for s in range(2)]
    return engine, talks.hold(prompts, examples, keys, limit, 1.0)


def test_later_turns_come_behind_the_very_tokens_with_keys_and_room_of_their_own(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    environment = Echo()
    engine, found = hold(tokenizer, tmp_path, [["a.", "bb", "cut~", "d"], ["e", "ff."], ["g"]], environment)
    assert engine.asked[0] == (["p", "q"], [(0, 0, 1, i, s) for i in range(2) for s in range(2)], 40)
    assert engine.asked[1] == (["pbb[bb]", "qd[d]"], [(0, 0, 1, 0, 1, 1), (0, 0, 1, 1, 1, 1)], [34, 36])
    assert engine.asked[2] == (["pbb[bb]e[e]"], [(0, 0, 1, 0, 1, 2)], [30])
    assert [tokenizer.decode(t) for t in found.tokens] == ["a.", "bb[bb]e[e]g", "cut~", "d[d]ff."]
    assert ["".join(str(int(mine)) for mine in own) for own in found.own] == ["11", "11000010001", "1111", "1000111"]
    assert [numbers.tolist() for numbers in found.logprobs][1::2] == [[-10, -9, -20, -30], [-10, -20, -19, -18]]
    assert found.truncated == [False, False, True, False]  # the turn limit cuts nothing
    assert found.texts == ["a.", "g", "cut~", "ff."]
    assert [m["role"] for m in found.messages[1]] == ["user", *["assistant", "tool"] * 2, "assistant"]
    told = {"row": 2, "conversation_id": conversation_id((0, 0, 1, 1, 1))}
    assert environment.seen[-1] == (found.messages[3], told) and len(environment.seen) == 5
    values = [np.arange(len(t)) for t in found.tokens]
    assert [each.tolist() for each in found.of_own(values)][3] == [0, 4, 5, 6]


def test_what_leaves_no_room_for_a_turn_is_not_said_and_the_answer_is_cut(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    for limit, cut in ((6, True), (7, False)):
        turns = [["bb", "a.", "a.", "a."], ["c"]]
        _, found = hold(tokenizer, tmp_path, turns, Echo(), limit, 2)
        assert found.truncated[0] == cut
        assert tokenizer.decode(found.tokens[0]) == ("bb" if cut else "bb[bb]c")
        assert found.marks.size == (0 if cut else 13)  # all are the policy's: no marks


WRONG = {
    "no list": ("7", "not a list of messages"),
    "no messages": ([], "not a list of messages"),
    "a message of no role": ([{"content": "7"}], "has not role and content"),
    "no words": ([{"role": "tool", "content": ""}], "knows no token"),
}


@pytest.mark.parametrize(("reply", "says"), WRONG.values(), ids=WRONG)
def test_an_answer_that_cannot_be_shown_stops_the_run_with_what_it_was_the_answer_to(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, reply: Any, says: str
):
    with pytest.raises(EnvironmentFailed, match="after 'a' to 'p'") as caught:
        hold(tokenizer, tmp_path, [["a", "b", "c", "d"]], Echo(reply))
    assert says in str(caught.value)


# --- an environment of one's own ---------------------------------------------------------------

TOOLS = """
import os, time

def respond(messages, metadata):
    said = messages[-1]["content"]
    if said == "crash":
        os._exit(3)
    if said == "sleep":
        time.sleep(60)
    return [{"role": "tool", "content": said + str(metadata["row"])}] if said.endswith("?") else None

def one(messages): ...
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_tools.py").write_text(TOOLS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_tools:respond"


def test_a_function_of_ones_own_answers_in_its_own_process_and_is_named_if_it_fails(tools: str):
    def said(text: str) -> list[Message]:
        return [{"role": "user", "content": "p"}, {"role": "assistant", "content": text}]

    for text, says in (("sleep", r"was not done after 0.5 s \(task.environment_timeout_s\)"), ("crash", "exit code 3")):
        environment = OwnEnvironment(tools, 0.5)
        assert environment.respond(said("a?"), {"row": 7}) == [{"role": "tool", "content": "a?7"}]
        assert environment.respond(said("a"), {"row": 7}) is None
        with pytest.raises(EnvironmentFailed, match=f"task.environment 'some_tools:respond' .*{says}.*{text}"):
            environment.respond(said(text), {"row": 7})
    with pytest.raises(ValueError, match=r"cannot be imported: .*one must be a function\(messages"):
        OwnEnvironment("some_tools:one", 0.5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("respond", "write it as module:function, for example my_tools:respond"),
        ("nowhere:respond", "there is no module 'nowhere'"),
        ("some_tools:respnd", "defines no 'respnd'; did you mean 'respond'"),
    ],
)
def test_an_environment_that_is_not_there_is_refused_when_the_config_is_read(tools: str, name: str, says: str):
    load("k5", [f"task.environment={tools}", "task.max_turns=2", "task.stop=['?']"])
    with pytest.raises(ConfigError, match=f"task.environment: .*{says}"):
        load("k5", [f"task.environment={name}", "task.max_turns=2"])


# --- the calculator ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        (["?"], "5"),
        (["1,6,5,8?"], "7"),
        (["1,6?"], "3"),
        (["1,6,", "5?"], "8"),
        (["1,6,5,8?", "7?"], "7"),
        (["1,6,5,8"], None),
        (["1,6,5,8#8?"], None),
        (["1,6,5,8,9?"], None),
    ],
)
def test_the_calculator_says_the_sum_up_to_where_it_is_asked(turns: list[str], answer: str | None):
    task, metadata = Calculator(0), {"digits": (2, 3, 8, 5, 9)}
    messages = [{"role": "user", "content": "2+3+8+5+9="}, *({"role": "assistant", "content": t} for t in turns)]
    found = task.respond(messages, metadata)
    assert found == (None if answer is None else [{"role": "tool", "content": answer}])


def test_the_last_turn_is_scored():
    example = Example("2+3+8+5+9=", "7")
    scores = {"#7$": 1, "1,6,5,7#7": 1, "#8": 0, "7": 0, "#7#7": 0, "?": 0, "": 0}
    assert {text: Calculator(0).score(example, text) for text in scores} == scores
