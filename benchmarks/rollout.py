"""How fast the model goes on with prompts: ours, and Hugging Face's generate with the same prompts as one batch.

    python benchmarks/rollout.py [--size 0.5B] [--layers 4] [--prompts 16] [--tokens 64] [--rounds 3]

A model of published widths with a few layers, in float32, greedy, no token ends an answer. generate pads on the left.
Both on all cores that the process may use.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import interleave, make_program, plain_sample, published, report, save_model

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.weights import load_model, open_checkpoint
from qwen_jax.run.rollout import RolloutMaker

SHORTEST, LONGEST = 200, 800


def drawn_prompts(count: int, vocabulary: int) -> list[TokenizedSample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST, count)
    return [plain_sample(i, rng.integers(0, vocabulary, n).astype(np.int32)) for i, n in enumerate(lengths)]


def ours(model: Path, prompts: list[TokenizedSample], tokens: int) -> Callable[[], list[list[int]]]:
    program = replace(make_program(model, LONGEST + tokens), with_answers=True)
    loaded = load_model(
        open_checkpoint(model), program.config, program.num_layers, np.dtype("float32"), program.mesh, True
    )
    settings = SimpleNamespace(rollout=tokens, rollout_temperature=0.0, rollout_seed=0, prompt_format="rows")
    job = SimpleNamespace(settings=settings, step=program, source=SimpleNamespace(folder=model / "none"))
    tokenizer = SimpleNamespace(eos_token_id=-1)  # no token
    make = RolloutMaker(job, tokenizer, Capture(Compilation(program), loaded))
    return lambda: [each.token_ids[-tokens:].tolist() for each in make(prompts, {})]


def theirs(model: Path, prompts: list[TokenizedSample], tokens: int) -> Callable[[], list[list[int]]]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids.astype(np.int64))
        mask[row, longest - len(prompt.token_ids) :] = 1
    flags = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: loaded.generate(ids, attention_mask=mask, **flags)[:, longest:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as root:
        shape = published(args.size, args.layers)
        model = save_model(Path(root), shape)
        prompts = drawn_prompts(args.prompts, shape[5])
        cases = {
            "ours": ours(model, prompts, args.tokens),
            "Hugging Face": theirs(model, prompts, args.tokens),
        }
        same = sum(a == b for a, b in zip(*(case() for case in cases.values()), strict=True))
        seconds = interleave(cases, args.rounds)
    total = args.prompts * args.tokens
    rows = [(name, f"{total / each:.1f} tokens/s, {each:.2f} s") for name, each in seconds.items()]
    rows += [("ratio", f"{seconds['Hugging Face'] / seconds['ours']:.2f}")]
    rows += [("the same answers", f"{same} of {args.prompts}")]
    report(
        f"{args.tokens} tokens after each of {args.prompts} prompts of {SHORTEST} to {LONGEST} tokens", rows
    )


if __name__ == "__main__":
    main()
