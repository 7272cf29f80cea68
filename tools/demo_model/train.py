"""Trains the demo model that ships with manta, and asks it the evaluation questions.

    python tools/demo_model/train.py --out deploy/demo_model

A Qwen3 network of about 3.4 million parameters with its own byte-level BPE, on the documents of
corpus.py. Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
tokenizer_config.json, chat_template.jinja and train.log to --out. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import corpus as text
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' + message.role + '; allowed are system, user and \
assistant.') }}
    {%- endif %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('A system message must come first.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

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
    """Byte-level BPE over the whole byte alphabet, so that any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, documents: list[str]) -> tuple[Tensor, Tensor]:
    """All documents as one row of token ids, and the loss weight of each token.

    In a conversation only the answers count in full: the weight of a token is that of the role
    named after the last <|im_start|> before it.
    """
    parts: list[np.ndarray] = []
    for first in range(0, len(documents), 20_000):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents[first : first + 20_000])
        parts += [np.asarray(e.ids, dtype=np.int32) for e in encoded]
    ids = np.concatenate(parts)
    end, start = (tokenizer.convert_tokens_to_ids(t) for t in SPECIAL[:2])
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
    return torch.from_numpy(ids), torch.from_numpy(weights)


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


def with_noise(rows: Tensor, weights: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """``rows`` with some of the users' tokens replaced, so that the model learns to answer what is
    worded in another way than it has ever seen. Special tokens stay."""
    chance = torch.rand(rows.shape, generator=generator, device=rows.device)
    noise = torch.randint(len(SPECIAL), vocab, rows.shape, generator=generator, device=rows.device)
    noisy = (weights == USER_LOSS) & (rows >= len(SPECIAL)) & (chance < USER_NOISE)
    return torch.where(noisy, noise, rows)


def row_loss(model: Any, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of the next token. rows, weights: [rows, length + 1]."""
    # No mask at all lets attention run as plainly causal, also when traced by torch.compile.
    causal = {"full_attention": None}
    hidden = model.model(input_ids=rows[:, :-1], attention_mask=causal, use_cache=False)[0]
    logits = F.linear(hidden, model.model.embed_tokens.weight)
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()


def train(model: Any, ids: Tensor, weights: Tensor, args: argparse.Namespace,
          device: torch.device, log: Log) -> None:  # fmt: skip
    """AdamW with warm-up and cosine decay, on rows that begin at random document starts.

    A row runs on through the documents after its first: a document at the start of a row is seen
    as it is at inference, the others teach the model to begin anew after <|endoftext|>.
    """
    pad = max(LENGTHS) + 1
    ids = F.pad(ids, (0, pad)).long().to(device)
    weights = F.pad(weights, (0, pad)).to(device)
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
                rows = with_noise(ids[index], weights[index], VOCAB, generator)
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
    log.stage(f"trained {step} steps on {seen / 1e6:.0f}M tokens")


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes the checkpoint in bf16, with no other file than those named above."""
    model = model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0, eos_token_id=[2, 0])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def complete(model: Any, tokenizer: Any, prompts: list[str],
             tokens: int, batch: int = 64) -> list[str]:  # fmt: skip
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


def evaluate(out: Path, device: torch.device, limit: int, log: Log) -> None:
    """Asks the saved checkpoint all evaluation questions and prints every failure."""
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    model = model.to(device).eval()
    with (HERE / "questions.jsonl").open(encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    questions = questions[:limit] if limit else questions

    def rendered(messages: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def question_prompt(question: dict[str, Any]) -> str:
        said = str(question["prompt"])
        return (
            said if question["kind"] == "plain" else rendered([{"role": "user", "content": said}])
        )

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
    for prompt, said in zip(SAMPLES, complete(model, tokenizer, SAMPLES, 96), strict=True):
        log(f"  {prompt} |{said}")
    for turns in CHATS:
        messages: list[dict[str, str]] = []
        for user in turns:
            messages.append({"role": "user", "content": user})
            [said] = complete(model, tokenizer, [rendered(messages)], 96)
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
    log.stage(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.0f} MB")
    tokenizer = train_tokenizer(documents[:60_000])
    log.stage(f"tokenizer of {len(tokenizer)} tokens")
    ids, weights = encode(tokenizer, documents)
    log.stage(f"{len(ids) / 1e6:.1f}M tokens, {len(ids) / len(documents):.0f} for each document")
    model = build(args.seed).to(device)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    torch.set_float32_matmul_precision("high")
    train(model, ids, weights, args, device, log)
    save(model, tokenizer, args.out)
    log.stage("saved")
    evaluate(args.out, device, args.questions, log)
    log.stage("done")


if __name__ == "__main__":
    main()
