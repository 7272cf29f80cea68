"""Trains the demo model that ships with manta, and asks it the evaluation questions.

    PYTHONPATH=. python tools/demo_model/train.py --out deploy/demo_model

A Qwen3 network of about 3.4 million parameters with its own byte-level BPE, on the documents of
corpus.py. Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
tokenizer_config.json, chat_template.jinja and train.log to --out. The root of the repository must
be on PYTHONPATH. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import corpus as text
import numpy as np
import torch
import torch.nn.functional as F
from agent_questions import Question, is_right, prompt_of
from chats import CHAT_TEMPLATE, TAGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
VOCAB = 4096
LENGTHS = (512, 512, 512, 512, 2048)  # tokens of a row, in turn; conversations reach past 1000
USER_NOISE = 0.06  # share of the tokens of what users say that are replaced by random ones
USER_LOSS = 0.1  # weight of what users and systems say; answers and plain text count 1
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Free prompts whose continuations are printed after training.
SAMPLES = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
    "Once upon a time",
    "The sun is",
    "My favourite food is",
    "In the morning",
    "I think that",
    "She opened the door and",
    "The best way to learn",
    "Dear Anna,",
    "Large language models",
    "When I was a child,",
    "It was a dark night",
    "Paris is",
    "The old man",
    "I would like to",
]
CHATS = [
    ["Tell me a joke.", "Another one, please."],
    ["Hi, my name is Gandalf.", "What is the capital of Norway?", "And of Peru?", "Who am I?"],
    ["Tell me a story about a fox.", "Thank you!"],
    ["Write a sentence about the sea.", "What is 7 plus 8?", "Spell garden."],
    ["Repeat after me: green tea and seven stones", "Who was Ada Lovelace?", "Goodbye!"],
]


class Log:
    """Prints lines and keeps them in train.log."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def stage(self, line: str) -> None:
        self(f"[{time.monotonic() - self.start:6.1f} s] {line}")


def train_tokenizer(documents: list[str]) -> Any:
    """Byte-level BPE over the whole byte alphabet, so that any text can be encoded.

    Tags are tokens of their own, the last ids. They are not special, so that they stay in the text
    of an answer, where parsers look for them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, SPECIAL + TAGS)))
    bpe.train_from_iterator((part for d in documents for part in marks.split(d)), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Encoded(NamedTuple):
    """Documents as one row of tokens.

    ids; weights: of each token in the loss; noisy: whether it may be replaced by noise. [tokens]
    """

    ids: Tensor
    weights: Tensor
    noisy: Tensor


def encode(tokenizer: Any, documents: list[text.Document]) -> Encoded:
    """In a conversation only the answers count in full: the weight of a token is that of the role
    named after the last <|im_start|> before it.

    Only talk may be noisy: what else users say is copied into calls and JSON.
    """
    parts: list[np.ndarray] = []
    for first in range(0, len(documents), 20_000):
        texts = [d.text for d in documents[first : first + 20_000]]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
        parts += [np.asarray(e.ids, dtype=np.int32) for e in encoded]
    is_talk = np.repeat([d.kind == "talk" for d in documents], [len(part) for part in parts])
    ids = np.concatenate(parts)
    end, start, think = (tokenizer.convert_tokens_to_ids(t) for t in (*SPECIAL[:2], "<think>"))
    [answering] = tokenizer.encode("assistant")
    marks = np.flatnonzero((ids == start) | (ids == end))
    # A mark opens a turn of the role that follows it; after <|endoftext|> plain text begins.
    opens = ids[marks] == start
    role = ids[np.minimum(marks + 1, len(ids) - 1)]
    weight = np.where(~opens | (role == answering), 1.0, USER_LOSS)
    lengths = np.diff(np.append(marks, len(ids)))
    weights = np.concatenate([np.ones(marks[0]), np.repeat(weight, lengths)]).astype(np.float32)
    weights[marks[opens]] = USER_LOSS  # the mark itself and the role name belong to the template
    weights[np.minimum(marks[opens] + 1, len(ids) - 1)] = USER_LOSS
    noisy = is_talk & (weights == USER_LOSS) & (ids >= len(SPECIAL))
    # The prompt opens the thinking, so that a model that is not asked to think must not begin to;
    # and closes it before a call that must be made.
    opened = np.flatnonzero(ids == think)
    closed = opened[ids[opened + 2] == tokenizer.convert_tokens_to_ids("</think>")] + 2
    for places in (opened, opened + 1, closed, closed + 1):
        weights[places] = 0
    return Encoded(*map(torch.from_numpy, (ids, weights, noisy)))


def build(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config)


def with_noise(rows: Tensor, noisy: Tensor, generator: torch.Generator) -> Tensor:
    """``rows`` with some of the users' tokens replaced, so that the model learns to answer what is
    worded in another way than it has ever seen."""
    chance = torch.rand(rows.shape, generator=generator, device=rows.device)
    noise = torch.randint(len(SPECIAL), VOCAB - len(TAGS), rows.shape, generator=generator,
                          device=rows.device)  # fmt: skip
    return torch.where(noisy & (chance < USER_NOISE), noise, rows)


def row_loss(model: Any, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of the next token. rows, weights: [rows, length + 1]."""
    # No mask at all lets attention run as plainly causal, also when traced by torch.compile.
    causal = {"full_attention": None}
    hidden = model.model(input_ids=rows[:, :-1], attention_mask=causal, use_cache=False)[0]
    logits = F.linear(hidden, model.model.embed_tokens.weight)
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()


class Probe:
    """Documents that are not trained on, of each kind."""

    def __init__(self, tokenizer: Any, seed: int, device: torch.device) -> None:
        self.kinds: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in text.KINDS:
            encoded = encode(tokenizer, text.documents(seed + 1, 200, kind=kind)[:200])
            rows = min(8, len(encoded.ids) // 513)
            ids, weights = (t[: rows * 513].reshape(rows, 513).to(device) for t in encoded[:2])
            self.kinds[kind] = ids.long(), (weights == 1).float()

    @torch.no_grad()
    def losses(self, model: Any) -> str:
        """The mean cross entropy of the answers' tokens, by kind."""
        found = {kind: row_loss(model, *rows).item() for kind, rows in self.kinds.items()}
        return "  ".join(f"{kind} {loss:.3f}" for kind, loss in found.items())


def train(model: Any, documents: Encoded, probe: Probe, args: argparse.Namespace,
          device: torch.device, log: Log) -> None:  # fmt: skip
    """AdamW with warm-up and cosine decay, on rows that begin at random document starts.

    A row runs on through the documents after its first: a document at the start of a row is seen
    as it is at inference, the others teach the model to begin anew after <|endoftext|>.
    """
    pad = max(LENGTHS) + 1
    ids, weights, noisy = (F.pad(t, (0, pad)).to(device) for t in documents)
    ids = ids.long()
    ends = (ids[: len(ids) - pad] == 0).nonzero().flatten()
    starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    loss_of = torch.compile(row_loss, dynamic=False) if args.compile else row_loss
    generator = torch.Generator(device).manual_seed(args.seed)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    begun, seen, step = time.monotonic(), 0, 0
    while True:
        elapsed = time.monotonic() - begun
        # The minutes are a budget: when they run out first, the decay still ends at its end.
        progress = step / args.steps
        if args.minutes:
            progress = max(progress, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        rate = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup) * rate
        length = LENGTHS[step % len(LENGTHS)]
        pick = torch.randint(len(starts), (max(1, args.batch_tokens // length),),
                             generator=generator, device=device)  # fmt: skip
        index = starts[pick, None] + torch.arange(length + 1, device=device)
        try:
            with autocast:
                rows = with_noise(ids[index], noisy[index], generator)
                loss = loss_of(model, rows, weights[index])
            loss.backward()
        except Exception as error:
            if loss_of is row_loss:
                raise
            log.stage(f"torch.compile failed, going on without it: {error!r:.300}")
            loss_of = row_loss
            optimizer.zero_grad(set_to_none=True)
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += index.numel()
        step += 1
        if step % args.log_every == 0 or step in (1, 10):
            value = loss.item()  # also waits for the device, so that the clock is right
            speed = seen / (time.monotonic() - begun)
            log.stage(f"step {step:5d}  loss {value:.4f}  progress {progress:.3f}  "
                      f"{seen / 1e6:.0f}M tokens  {speed / 1e3:.0f}k tokens/s")  # fmt: skip
        if step % (10 * args.log_every) == 0 or step == 10:
            with autocast:
                log(f"  answers that were not trained on: {probe.losses(model)}")
    log.stage(f"trained {step} steps on {seen / 1e6:.0f}M tokens")


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes the checkpoint in bf16, with no other file than those named above."""
    model = model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0, eos_token_id=[2, 0])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def complete(model: Any, tokenizer: Any, prompts: list[str],
             tokens: int, batch: int = 128) -> list[str]:  # fmt: skip
    """Greedy continuations of rendered prompts, in batches of about the same length."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        inputs = inputs.to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, said in zip(part, texts, strict=True):
            answers[i] = said
    return answers


def read_questions(file: str, limit: int) -> list[Question]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][: limit or None]


def evaluate(out: Path, device: torch.device, limit: int, log: Log) -> None:
    """Asks the saved checkpoint all evaluation questions and prints every failure."""
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    model = model.to(device).eval()
    evaluate_talk(model, tokenizer, limit, log)
    evaluate_agents(model, tokenizer, limit, log)
    show_samples(model, tokenizer, log)


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def evaluate_talk(model: Any, tokenizer: Any, limit: int, log: Log) -> None:
    """The questions of questions.jsonl: an answer must hold one of the expected strings."""
    questions = read_questions("questions.jsonl", limit)

    def question_prompt(question: Question) -> str:
        said = str(question["prompt"])
        if question["kind"] == "plain":
            return said
        return rendered(tokenizer, [{"role": "user", "content": said}])

    prompts = [question_prompt(q) for q in questions]
    answers = complete(model, tokenizer, prompts, 96)
    failures = []
    right = {False: 0, True: 0}
    for question, said in zip(questions, answers, strict=True):
        if any(x.lower() in said.lower() for x in question["expect"]):
            right[question["held_out"]] += 1
        else:
            failures.append((question, said))
    for held_out, name in ((False, "phrasings of the corpus"), (True, "held-out phrasings")):
        total = sum(q["held_out"] == held_out for q in questions)
        log(f"{name}: {right[held_out]} of {total} right")
    for question, said in failures:
        log(f"  wrong{' (held out)' if question['held_out'] else ''}: {question['prompt']!r} -> "
            f"{said!r}, expected one of {question['expect'][:3]}")  # fmt: skip


def evaluate_agents(model: Any, tokenizer: Any, limit: int, log: Log) -> None:
    """The questions of agent_questions.jsonl, about tools, JSON and thinking."""
    questions = read_questions("agent_questions.jsonl", limit)
    answers = complete(model, tokenizer, [prompt_of(q)[0] for q in questions], 160)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    failures = []
    for question, said in zip(questions, answers, strict=True):
        kind = question["kind"] + (", held out" if question["held_out"] else "")
        asked[kind] += 1
        if is_right(question, said):
            right[kind] += 1
            continue
        last = question["messages"][-1]["content"]
        wanted = next(question[key] for key in ("calls", "json", "expect") if key in question)
        failures.append(f"  wrong ({kind}): {last!r} -> {said!r}, expected {wanted}")
    for kind in sorted(asked):
        log(f"{kind}: {right[kind]} of {asked[kind]} right")
    for failure in failures:
        log(failure)


def show_samples(model: Any, tokenizer: Any, log: Log) -> None:
    """Free continuations and some chats."""
    for prompt, said in zip(SAMPLES, complete(model, tokenizer, SAMPLES, 96), strict=True):
        log(f"  {prompt} |{said}")
    for turns in CHATS:
        messages: list[dict[str, str]] = []
        for user in turns:
            messages.append({"role": "user", "content": user})
            [said] = complete(model, tokenizer, [rendered(tokenizer, messages)], 96)
            messages.append({"role": "assistant", "content": said})
            log(f"  user: {user}\n    model: {said}")
        log("")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trains the demo model that ships with manta.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--documents", type=int, default=400_000, help="size of the corpus")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=0, help="at most so long, 0: no limit")
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of warm-up")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100, help="steps between log lines")
    parser.add_argument("--questions", type=int, default=0, help="ask only so many, 0: all")
    parser.add_argument("--only-evaluate", action="store_true", help="ask the model in --out")
    args = parser.parse_args()
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only_evaluate:
        evaluate(args.out, device, args.questions, Log(Path(os.devnull)))
        return
    log = Log(args.out / "train.log")
    settings = ", ".join(f"{key}={value}" for key, value in vars(args).items() if key != "out")
    log(f"torch {torch.__version__}, device {device}, {settings}")
    processes = min(16, len(os.sched_getaffinity(0))) if args.documents > 20_000 else 1
    documents = text.documents(args.seed, args.documents, processes)
    random.Random(args.seed).shuffle(documents)
    log.stage(f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.0f} MB")
    tokenizer = train_tokenizer([d.text for d in documents[:60_000]])
    log.stage(f"tokenizer of {len(tokenizer)} tokens")
    encoded = encode(tokenizer, documents)
    count = len(encoded.ids)
    log.stage(f"{count / 1e6:.1f}M tokens, {count / len(documents):.0f} for each document")
    model = build(args.seed).to(device)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    torch.set_float32_matmul_precision("high")
    train(model, encoded, Probe(tokenizer, args.seed, device), args, device, log)
    save(model, tokenizer, args.out)
    log.stage("saved")
    evaluate(args.out, device, args.questions, log)
    log.stage("done")


if __name__ == "__main__":
    main()
