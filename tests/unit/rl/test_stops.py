"""Where answers end: at what any of the model's files names, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deploy.export import _write_ends
from rl.batch import Batch, Prompts
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, ValConfig
from rl.model_files import BUILTIN
from rl.model_shape import ModelRefused
from rl.rollout import RolloutWorker
from rl.stops import StopTexts, end_of_turn, stop_tokens
from rl.task_config import TaskConfig

TINY = BUILTIN / "tiny"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = "{% for m in messages %}<s>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
SYSTEM_FIRST = "{{ raise_exception('a system message comes first') }}"
PROMPTS_ALONE = "<s>{{ messages[0].content }}"
TEMPLATES = [
    (CHATML, "<|im_end|>"),
    (LLAMA3, "<|eot_id|>"),
    (MISTRAL, "</s>"),
    (CHATML.replace("<|im_end|>\n", "  \n<|end|><|endoftext|>"), "<|end|>"),
    (CHATML.replace("<|im_end|>", "### End"), None),  # ordinary text ends no answer
    (SYSTEM_FIRST, None),
    (PROMPTS_ALONE, None),
    (None, None),
]


def tokenizer(template: str | None, eos: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["a", "b", *SPECIAL])}, unk_token="a"))
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, additional_special_tokens=SPECIAL)
    found.chat_template = template
    return found


def folder_of(path: Path, *, config: object, generation: object, made: PreTrainedTokenizerFast | None) -> Path:
    """The metadata of a model; `...` leaves a key or a file out."""
    path.mkdir(exist_ok=True)
    named = {} if config is ... else {"eos_token_id": config}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 9} | named))
    if generation is not ...:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if made:
        made.save_pretrained(path)
    return path


@pytest.mark.parametrize(("template", "token"), TEMPLATES)
def test_the_end_of_a_turn_is_the_special_token_behind_the_assistants_words(template: str | None, token: str | None):
    made = tokenizer(template)
    found = end_of_turn(made)
    assert (None if found is None else made.convert_ids_to_tokens(found)) == token


@pytest.mark.parametrize(
    ("config", "generation", "template", "eos", "ends"),
    [
        (8, ..., None, None, [8]),
        ([8, 2], ..., None, None, [2, 8]),
        (8, [3, 8], None, None, [3, 8]),  # a chat model names more there
        (8, 3, None, None, [3, 8]),
        (8, ..., None, "</s>", [3, 8]),  # a config that disagrees with its tokenizer
        (8, ..., CHATML, "</s>", [3, 5, 8]),
        (..., ..., CHATML, None, [5]),
        (None, None, None, "</s>", [3]),
    ],
)
def test_all_that_the_files_name_are_ends(
    tmp_path: Path, config: object, generation: object, template: str | None, eos: str | None, ends: list[int]
):
    made = tokenizer(template, eos)
    assert stop_tokens(folder_of(tmp_path, config=config, generation=generation, made=made)) == ends


@pytest.mark.parametrize("made", [tokenizer(None), tokenizer(SYSTEM_FIRST), None], ids=["plain", "refuses", "none"])
@pytest.mark.parametrize("config", [None, ...], ids=["null", "missing"])
def test_a_model_without_any_end_is_refused_also_if_its_family_has_a_default(
    tmp_path: Path, config: object, made: PreTrainedTokenizerFast | None
):
    folder = folder_of(tmp_path, config=config, generation=..., made=made)
    with pytest.raises(ModelRefused, match=r"names no token that ends an answer.*add its eos_token_id to config\.json"):
        stop_tokens(folder)


def test_the_built_in_model_ends_where_it_always_did():
    assert stop_tokens(TINY) == [1]


def test_a_config_that_disagrees_with_its_tokenizer_does_not_keep_answers_from_ending(tmp_path: Path):
    """Its own end is one that the policy never says."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((model / name).read_text()) | {"eos_token_id": 0}
        (model / name).write_text(json.dumps(content))
    before, after = (answers(ModelConfig(path=path)) for path in ("builtin:tiny", str(model)))
    assert not before.truncated.all() and before.rewards.any()
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_array_equal(after.truncated, before.truncated)
    np.testing.assert_array_equal(after.rewards, before.rewards)


def answers(model: ModelConfig) -> Batch:
    parts = (model, TaskConfig(), GrpoConfig(), RolloutConfig(), SnapshotConfig())
    frame, *_ = RolloutWorker(*parts, seed=3, val=ValConfig(size=8), threads=1).generate(
        Prompts("train", 1, (0, 1, 2, 3), 4, 1.0)
    )
    return Batch.from_frame(frame, "engine")[1]


@pytest.mark.parametrize(
    ("config", "generation", "written"), [(8, ..., [3, 8]), (3, ..., ...), (8, [3, 8], [3, 8]), (8, 3, [3, 8])]
)
def test_an_export_says_where_the_runs_answers_ended(
    tmp_path: Path, config: object, generation: object, written: object
):
    base = folder_of(tmp_path / "base", config=config, generation=generation, made=tokenizer(None, "</s>"))
    out = Path(shutil.copytree(base, tmp_path / "out"))
    _write_ends(base, out)
    file = out / "generation_config.json"
    assert (json.loads(file.read_text())["eos_token_id"] if file.exists() else ...) == written


# --- texts --------------------------------------------------------------------------------------


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, some pairs of letters, and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "ab", "bc"])}
    core = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", additional_special_tokens=["<s>"])


@pytest.mark.parametrize(
    ("texts", "turn", "ends_at"),
    [
        (["abc"], [*"xab", "ab", "c", "x"], 5),
        (["ca", "abc"], ["ab", *"cab"], 2),
        (["b"], ["x", "ab", "x"], 2),  # within a token
        (["é"], [*"x", "\xc3", "\xa9", "x"], 3),  # a character of two tokens
        (["a<s>b"], ["a", "<s>", "b", "x"], 3),
        (["abc"], ["a", "<s>", "bc", "ab"], None),
        (["zz"], ["\xff", "\xff", "z", "\xc3", "z", "z"], 6),  # bytes that are no text
    ],
)
def test_a_text_ends_a_turn_with_the_first_token_that_completes_it(
    texts: list[str], turn: list[str], ends_at: int | None
):
    made = bytes_tokenizer()
    of_byte = dict(zip(range(256), map(made.convert_tokens_to_ids, byte_pieces()), strict=True))
    ids = [of_byte[ord(t)] if len(t) == 1 else made.convert_tokens_to_ids(t) for t in turn]
    said = StopTexts(made, texts).turn(ids)  # what stands before a turn ends none
    assert next((n for n, token in enumerate(ids, 1) if said.ends_with(token)), None) == ends_at
    decoded = [made.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    holds = [n for n, text in enumerate(decoded, 1) if any(stop in text for stop in texts)]
    assert (holds or [None])[0] == ends_at


def byte_pieces() -> list[str]:
    """What a byte is called in the vocabulary of a byte-level tokenizer, as GPT-2 has it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def test_texts_need_a_tokenizer_that_decodes_token_by_token():
    with pytest.raises(ValueError, match=r"task.stop needs a tokenizer.json of the model, not a object"):
        StopTexts(object(), ["a"])  # pyright: ignore[reportArgumentType]
