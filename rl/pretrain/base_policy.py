"""Train a small base policy from demonstrations: the one that ships with the package, or one of another task.

    python -m rl.pretrain.base_policy --out rl/builtin/tiny
    python -m rl.pretrain.base_policy --task chain_sum --out models/chain

A small decoder learns the demonstrations of `rl/pretrain/demonstrations.py`, slips included, by
next-token prediction on the answer's tokens. It must end near even odds: much weaker and most groups of
samples earn nothing, much stronger and reinforcement learning has nothing left to gain. A policy
outside `ACCURACY` is not written.
"""

import argparse
import math
import os
import random
import re
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rl.pretrain.demonstrations import LESSONS, Lesson
from rl.sums_task import EOS
from rl.tasks import Task

PAD = "<pad>"
MAX_NEW_TOKENS = 40
ACCURACY = (0.40, 0.60)


def build_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character. A character outside the alphabet is dropped."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([PAD, EOS, *alphabet])}))
    core.normalizer = normalizers.Replace(Regex(f"[^{re.escape(alphabet + EOS)}]"), "")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), "of one token"
    return found


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    pad, eos = _id(tokenizer, PAD), _id(tokenizer, EOS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,  # the whole distribution: the library would otherwise keep the 50 likeliest tokens
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    return model


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lesson: Lesson,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup, started = max(1, steps // 20), time.time()
    model.train()
    for step in range(steps):
        examples = [lesson.task.example("train", step * batch + i) for i in range(batch)]
        answers = [lesson.demonstrate(e, rng) for e in examples]
        ids = tokenizer(
            [e.text + a for e, a in zip(examples, answers)],
            padding=True, padding_side="right", return_tensors="pt",
        )  # fmt: skip
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
        for row, prompt in zip(labels, tokenizer([e.text for e in examples]).input_ids):
            row[: len(prompt)] = -100

        progress = max(0.0, (step - warmup) / (steps - warmup))
        scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss = model(**ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)


@torch.inference_mode()
def validate(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, size: int) -> dict[str, float]:
    """Sampled at temperature 1; an answer without EOS was cut off and scores nothing."""
    model.eval()
    examples = [task.example("val", i) for i in range(size)]
    prompts = tokenizer([e.text for e in examples], padding=True, return_tensors="pt")
    out = model.generate(**prompts)  # pyright: ignore[reportAttributeAccessIssue], a mixin that the library loads lazily
    answers = out[:, prompts.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    whole = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    lengths = (answers != tokenizer.pad_token_id).sum(dim=1).float()
    scores = [task.score(e, t) if w else 0.0 for e, t, w in zip(examples, texts, whole)]
    return {
        "accuracy": sum(scores) / size,
        "mean length": lengths.mean().item(),
        "longest": lengths.max().item(),
        "cut off": 1 - sum(whole) / size,
    }


def write(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """All of it or nothing: a folder that is there is a policy that loads."""
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if out.exists():
        shutil.rmtree(out)
    os.rename(unfinished, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--task", choices=sorted(LESSONS), default="sums", help="what it learns")
    parser.add_argument("--seed", type=int, default=0, help="of weights, demonstrations, sampling")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--val-size", type=int, default=2048, help="validation prompts, >= 1024")
    args = parser.parse_args()
    if args.val_size < 1024:
        parser.error(f"--val-size {args.val_size} is too few to tell accuracies apart: use 1024 or more")
    if args.steps < 2:
        parser.error(f"--steps {args.steps} is too few: use 2 or more")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "config.json").exists():
        parser.error(f"--out {args.out} holds something else than a policy, and would be replaced: name another folder")

    torch.set_num_threads(1)  # the thread count changes the order of sums, and so the weights
    torch.manual_seed(args.seed)
    lesson = LESSONS[args.task](args.seed, args.val_size)
    tokenizer = build_tokenizer(lesson.alphabet)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, lesson, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)

    result = validate(model, tokenizer, lesson.task, args.val_size)
    print(f"validation on {args.val_size} prompts: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
    low, high = ACCURACY
    if not low <= result["accuracy"] <= high:
        raise SystemExit(
            f"accuracy {result['accuracy']:.3f} is outside {low}-{high}: nothing written. Too low:"
            " train longer (--steps). Too high: make the slips of its demonstrations more frequent."
        )
    write(model, tokenizer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
