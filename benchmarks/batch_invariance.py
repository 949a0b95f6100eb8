"""How many samples have the same bits whatever surrounds them: ours, and Hugging Face's padded batches.

    python benchmarks/batch_invariance.py [--samples 16] [--layers 2]

Samples of random lengths and tokens through a model of the 0.5B widths, in float32 and bfloat16, on 1, 2 and 8 forced
host devices, each in a process of its own. Their bits (activations and statistics) are compared with those of an
undisturbed run on one device. Tokens a step may change on a resume, but are no part of the promise. Hugging Face:
batches of four, padded, against each sample alone; its difference is relative to the layer's largest value.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from common import load_capture, make_program, output, plain_sample, published, report, save_model
from peers import hugging_face, padded

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import lay_into_steps
from qwen_jax.run.pipeline import CapturedSample, captured_samples

VOCABULARY, LONGEST = 1000, 700
DTYPES, DEVICES = ("float32", "bfloat16"), (1, 2, 8)
UNDISTURBED, LONGER_STEPS = "in order", "in order, twice the tokens a step"
BATCH_ROWS = 4

Digests = dict[str, str]


def make_samples(count: int) -> list[TokenizedSample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LONGEST, count)
    return [plain_sample(i, rng.integers(0, VOCABULARY, n).astype(np.int32)) for i, n in enumerate(lengths)]


def surroundings(samples: list[TokenizedSample]) -> dict[str, list[list[TokenizedSample]]]:
    """The same samples in other company: for each case the runs, one after the other."""
    rng, middle = np.random.default_rng(1), len(samples) // 2
    before = plain_sample(len(samples), np.ones(100, np.int32))
    mixed = {f"at random, {n}": [[samples[i] for i in rng.permutation(len(samples))]] for n in (1, 2, 3)}
    return {
        UNDISTURBED: [samples],
        "reversed": [samples[::-1]],
        **mixed,
        "100 tokens further on": [[before, *samples]],
        "cut in the middle": [samples[:middle], samples[middle:]],
        "each alone": [[sample] for sample in samples],
    }


def digest(sample: CapturedSample) -> str:
    """Of all that is stored of it."""
    sums = sample.taps["residual"].sums
    parts = [np.concatenate(sample.taps["residual"].pieces, axis=1), sums.norms_CR, sums.counts_E]
    parts += [sums.mean_CED, sums.squares_CED, sums.max_abs_CED]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def all_digests(model: Path, dtype: str, samples: list[TokenizedSample]) -> dict[str, Digests]:
    """By case and sample, on this process's devices."""
    programs = {times: make_program(model, 1024, batch_size=1, dtype=dtype, times=times) for times in (1, 2)}
    captures = {times: load_capture(program, model) for times, program in programs.items()}

    def found(runs: Sequence[list[TokenizedSample]], times: int = 1) -> Digests:
        captured = (
            sample
            for run in runs
            for sample in captured_samples(lay_into_steps(run, programs[times].shape), captures[times])
        )
        return {str(s.sample_idx): digest(s) for s in captured if s.sample_idx < len(samples)}

    cases = {name: found(runs) for name, runs in surroundings(samples).items()}
    return cases | {LONGER_STEPS: found([samples], 2)}


def on_devices(model: Path, dtype: str, count: int, devices: int) -> dict[str, Digests]:
    command = [sys.executable, __file__, "--samples", str(count), "--digests_of", str(model), dtype]
    return json.loads(output(command, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"))


def our_rows(model: Path, count: int) -> Iterator[tuple[str, str]]:
    for dtype in DTYPES:
        by_devices = {devices: on_devices(model, dtype, count, devices) for devices in DEVICES}
        undisturbed = by_devices[1][UNDISTURBED]
        for case in by_devices[1]:
            shares = [
                f"{sum(digests[case][i] == undisturbed[i] for i in undisturbed) / count:.0%}"
                for digests in by_devices.values()
            ]
            yield f"ours, {dtype}, {case}", "equal on 1, 2, 8 devices: " + ", ".join(shares)


def their_rows(model: Path, samples: list[TokenizedSample]) -> Iterator[tuple[str, str]]:
    tokens = [sample.token_ids for sample in samples]
    for dtype in DTYPES:
        forward = hugging_face(str(model), getattr(torch, dtype))
        alone = [padded(forward, [ids])[0] for ids in tokens]
        batched = [
            layers
            for start in range(0, len(tokens), BATCH_ROWS)
            for layers in padded(forward, tokens[start : start + BATCH_ROWS])
        ]
        pairs = [list(zip(*both, strict=True)) for both in zip(alone, batched, strict=True)]
        equal = sum(all(np.array_equal(one, other) for one, other in layers) for layers in pairs)
        largest = max(
            np.abs(one - other).max() / np.abs(one).max() for layers in pairs for one, other in layers
        )
        share = f"{equal / len(tokens):.0%}"
        yield (
            f"Hugging Face, {dtype}, padded batches of {BATCH_ROWS}",
            f"equal: {share}, largest difference {largest:.1e}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--digests_of", nargs=2, help=argparse.SUPPRESS
    )  # what the processes are started with
    args = parser.parse_args()
    samples = make_samples(args.samples)
    if args.digests_of:
        model, dtype = args.digests_of
        print(json.dumps(all_digests(Path(model), dtype, samples)))
        return
    hidden, mlp, layers, heads, kv_heads, *_ = published("0.5B", args.layers)
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), (hidden, mlp, layers, heads, kv_heads, VOCABULARY, True))
        rows = [*our_rows(model, args.samples), *their_rows(model, samples)]
    report(f"Samples with the bits of an undisturbed run, of {args.samples}, {layers} layers", rows)


if __name__ == "__main__":
    main()
