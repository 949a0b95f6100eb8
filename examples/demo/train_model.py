#!/usr/bin/env python3
"""Trains examples/demo/model, a tiny Qwen2, on three of the demo's kinds of tasks, and says what it solves.

Run from the repository's root: python -m examples.demo.train_model

The forward pass is the package's own, but for attention, which it computes in loops without a gradient. The model
learns copy alone first: on several kinds at once it copies no cell for long. Trained on all six it solved at most 12
of 32 tasks of a kind after 1,800 steps.

Letters in names: B prompts, M wanted tokens of a prompt; others as in qwen_jax/model/decoder.py.
"""

import argparse
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoTokenizer

import extract_activations
from examples.demo.make_stream import DEMO, TRAINED, kind_of, make_task, tasks, write
from qwen_jax.data.arc import parse_record
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import PromptEncoder, TokenizedSample
from qwen_jax.data.streams import read_stream
from qwen_jax.model.attention import Carried
from qwen_jax.model.config import ModelConfig, parse_config
from qwen_jax.model.decoder import Shared, abstract_model, rope_tables
from qwen_jax.model.weights import EMBEDDING, FINAL_NORM, LAYER_TENSORS, expected_shapes
from qwen_jax.reading import iter_samples
from qwen_jax.roles import RoleSet

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 512
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


class Stage(NamedTuple):
    """A part of the training: so many steps on tasks of these kinds, of so many pairs of grids each."""

    steps: int
    kinds: tuple[str, ...]
    pairs: int


STAGES = (
    Stage(400, ("copy",), 2),
    Stage(1400, TRAINED, 3),
)
BATCH, LEARNING_RATE, WARM_UP_STEPS = 8, 6e-3, 100
FIRST_OUTPUT_WEIGHT = 0.2
"""Of the loss on the first example's output, whose rule nothing tells yet."""
TRAINING_NUMBERS, HELD_OUT_NUMBERS, HELD_OUT_TASKS = 1000, 100, 32
"""Numbers of tasks, which are their seeds: training takes those from 1000 on, the demo's stream those below 100."""
ANSWER_TOKENS = 32
"""More than any answer has."""
QUERIES, REPORT_STEPS, SEED = 64, 25, 0


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on the demo stream; like Qwen's, every digit is a token of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # ties between merges are then broken the same way each time
    )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_prompts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def demo_prompts() -> list[str]:
    """The texts that the tokenizer is trained on: the demo stream's prompts."""
    layout = PROMPT_FORMATS["rows"]
    stream = (task for _, task in read_stream(DEMO / "streams" / "stream_000.jsonl"))
    return ["".join(segment.text for segment in layout.segments(task)) for task in stream]


class Lesson(NamedTuple):
    """Prompts with their answers behind them. wanted_BM: the tokens before those that are to be predicted. weights_BM:
    float32, of these in the loss; 0 where a prompt has fewer than M."""

    tokens_BT: np.ndarray
    wanted_BM: np.ndarray
    weights_BM: np.ndarray


class Teacher:
    """Makes lessons of tasks, all of a stage of one shape: no task is longer than one of kind copy."""

    def __init__(self, tokenizer: Any):
        self._end = tokenizer.eos_token_id
        self._encoder = PromptEncoder(tokenizer, include_answer=True)
        self._outputs, self._first = RoleSet(["example_output", "answer"]), RoleSet(["example_1_output"])

    def lessons(self, stages: Sequence[Stage]) -> Iterator[Lesson]:
        """One for each step; each task is seen once."""
        numbers = count(TRAINING_NUMBERS)
        for stage in stages:
            (longest,) = self._encoded([make_task("copy", 0, stage.pairs)])
            kinds = cycle(stage.kinds)
            for _ in range(stage.steps):
                chosen = [make_task(next(kinds), next(numbers), stage.pairs) for _ in range(BATCH)]
                rows = [self._row(sample, longest) for sample in self._encoded(chosen)]
                yield Lesson(*map(np.stack, zip(*rows, strict=True)))

    def _encoded(self, made: list[dict]) -> list[TokenizedSample]:
        return list(self._encoder.encode_many(enumerate(map(parse_record, made))))

    def _row(self, sample: TokenizedSample, longest: TokenizedSample) -> tuple[np.ndarray, ...]:
        """The sample's tokens and what ends its answer, with room as for the longest one."""
        weights = np.append(self._outputs.mask(sample.roles), True).astype(np.float32)
        weights[:-1][self._first.mask(sample.roles)] = FIRST_OUTPUT_WEIGHT
        wanted = np.flatnonzero(weights)
        most = 1 + int(self._outputs.mask(longest.roles).sum())
        return (
            np.pad(
                np.append(sample.token_ids, self._end), (0, len(longest.token_ids) - len(sample.token_ids))
            ),
            np.pad(wanted - 1, (0, most - len(wanted))),
            np.pad(weights[wanted], (0, most - len(wanted))),
        )


def attend(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, carried: Carried
) -> tuple[jax.Array, Carried]:
    """Causal attention of one prompt, in blocks of queries that leave out most of what is masked."""
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    q_KGTH = (q_TNH * H**-0.5).reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
    k_KHT, v_KTH = k_TKH.transpose(1, 2, 0), v_TKH.swapaxes(0, 1)
    blocks = []
    for start in range(0, T, QUERIES):
        stop = min(start + QUERIES, T)
        scores = jax.lax.batch_matmul(q_KGTH[:, :, start:stop].reshape(K, -1, H), k_KHT[:, :, :stop])
        is_seen = np.arange(stop) <= np.arange(start, stop)[:, None]
        scores += np.tile(np.where(is_seen, 0, -1e30), (N // K, 1)).astype(np.float32)
        out = jax.lax.batch_matmul(jax.nn.softmax(scores), v_KTH[:, :stop])
        blocks.append(out.reshape(K, N // K, -1, H))
    return jnp.concatenate(blocks, axis=2).transpose(2, 0, 1, 3).reshape(T, N, H), carried


def begin(config: ModelConfig, abstract: nnx.State) -> nnx.State:
    """Matrices with entries of variance 1 / fan-in, those that write to the residual stream smaller (GPT-2); biases of
    queries and keys too, which let heads begin at distances of their own; norms of ones."""

    def scale(name: str) -> float:
        if "bias" in name:
            return 0 if name.startswith("v") else 1
        if name.startswith("embed"):
            return 0.02
        writes = name.startswith(("o", "down"))
        fan_in = config.dims["F"] if name.startswith("down") else config.hidden_size
        return fan_in**-0.5 / (2 * config.num_layers) ** (0.5 * writes)

    filled = []
    for number, (path, leaf) in enumerate(nnx.to_flat_state(abstract)):
        if path[-1].startswith("scale"):
            values = jnp.ones(leaf.shape)
        else:
            key = jax.random.fold_in(jax.random.key(SEED), number)
            values = jax.random.normal(key, leaf.shape) * scale(path[-1])
        filled.append((path, leaf.replace(values)))
    return nnx.from_flat_state(filled)


def loss(graph: nnx.GraphDef, config: ModelConfig, params: nnx.State, lesson: Lesson) -> jax.Array:
    """Mean cross-entropy of the wanted tokens, in nats."""
    tables = rope_tables(config, lesson.tokens_BT.shape[1])

    def logits(tokens_T: jax.Array, wanted_M: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        _, x_TD, _ = model(tokens_T, Shared(*map(jnp.asarray, tables), attend), (), (0,), ())
        return model.logits(x_TD[wanted_M])

    logits_BMV = jax.vmap(logits)(lesson.tokens_BT, lesson.wanted_BM)
    next_BM = jnp.take_along_axis(lesson.tokens_BT, lesson.wanted_BM + 1, axis=1)
    losses_BM = optax.softmax_cross_entropy_with_integer_labels(logits_BMV, next_BM)
    return (losses_BM * lesson.weights_BM).sum() / lesson.weights_BM.sum()


def learning_rate(steps: int, step: jax.Array) -> jax.Array:
    """Up in the first steps, down to nothing from a quarter of the steps on."""
    falling = (steps - step) / (0.75 * steps)
    return LEARNING_RATE * jnp.clip(jnp.minimum(step / WARM_UP_STEPS, falling), 0, 1)


def train(tokenizer: Any, stages: Sequence[Stage]) -> tuple[nnx.State, list[float]]:
    """The parameters, and the loss of each step."""
    config = parse_config(CONFIG)
    graph, abstract = nnx.split(abstract_model(config, config.num_layers, jnp.float32, with_head=True))
    params = begin(config, abstract)
    schedule = partial(learning_rate, sum(stage.steps for stage in stages))
    optimizer = optax.chain(optax.clip_by_global_norm(1), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @jax.jit
    def step(params: nnx.State, state: Any, lesson: Lesson) -> tuple[nnx.State, Any, jax.Array]:
        value, gradient = jax.value_and_grad(partial(loss, graph, config))(params, lesson)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for number, each in enumerate(Teacher(tokenizer).lessons(stages), 1):
        params, state, value = step(params, state, each)
        losses.append(float(value))
        if number % REPORT_STEPS == 0:
            print(f"step {number}: loss {np.mean(losses[-REPORT_STEPS:]):.3f}", flush=True)
    return params, losses


def write_weights(folder: Path, params: nnx.State) -> None:
    """In bfloat16, under the names and in the shapes of a Hugging Face checkpoint."""
    of = {path: np.asarray(leaf[...]).astype(ml_dtypes.bfloat16) for path, leaf in nnx.to_flat_state(params)}
    tensors = {EMBEDDING: of["embed_VD",], FINAL_NORM: of["final_norm", "scale_D"]}
    for suffix, (path, _, _) in LAYER_TENSORS.items():
        for layer, values in enumerate(of.get(("blocks", *path), ())):
            tensors[f"model.layers.{layer}.{suffix}"] = values
    shapes = expected_shapes(parse_config(CONFIG), with_head=True)
    shaped = {name: tensors[name].reshape(shape) for name, shape in shapes.items()}
    save_file(shaped, folder / "model.safetensors", metadata={"format": "pt"})


def solved_by_kind(model: Path) -> dict[str, dict[str, float]]:
    """What the model makes of held-out tasks, by the worker: of each kind how many there are, how many it solves, and
    the mean log-probability (nats) of a token of the true answers."""
    found: dict[str, dict[str, float]] = defaultdict(
        lambda: {"tasks": 0, "solved": 0, "log_probability": 0.0}
    )
    with TemporaryDirectory() as root:
        write(Path(root), tasks(HELD_OUT_NUMBERS, HELD_OUT_TASKS))
        for sample in extracted(model, root, "--rollout", str(ANSWER_TOKENS)):
            found[kind_of(sample["task_id"])]["tasks"] += 1
            found[kind_of(sample["task_id"])]["solved"] += sample["solved"]
        for sample in extracted(model, root, "--include_answer"):
            found[kind_of(sample["task_id"])]["log_probability"] += (
                float(sample["answer_logprobs"].mean()) / HELD_OUT_TASKS
            )
    return {
        kind: counts | {"log_probability": round(counts["log_probability"], 4)}
        for kind, counts in found.items()
    }


def extracted(model: Path, root: str, *flags: str) -> Iterator[dict[str, Any]]:
    """The samples of a run over the stream in `root`."""
    output = Path(root) / flags[0] / "worker_0"
    paths = ("--dataset_dir", root, "--model_path", str(model), "--output_dir", str(output))
    small = (
        "--layers_to_extract",
        "0",
        "--keep_tokens",
        "last",
        "--no_checkpointing",
        "--max_seq_length",
        "512",
    )
    extract_activations.main(["--worker_id", "0", *paths, *small, *flags])
    return iter_samples(output)


def main(folder: Path = DEMO) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    write_tokenizer(model)
    params, losses = train(AutoTokenizer.from_pretrained(model), STAGES)
    write_weights(model, params)
    record = {
        "sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "steps": len(losses),
        "last_loss": round(float(np.mean(losses[-REPORT_STEPS:])), 4),
        "held_out": solved_by_kind(model),
    }
    (folder / "trained.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
