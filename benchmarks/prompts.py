"""How fast prompts are made: useful tokens a second, against a loop that tokenises again for each dropped example.

    python benchmarks/prompts.py [--samples 100] [--rounds 3]

Long tasks (common.long_rows), parsed, to token ids, roles and cells; reading and parsing lines is not timed. Useful
tokens are those of the samples that come out. Both must give the same.
"""

import argparse

import numpy as np
from common import TOKENIZER, interleave, long_rows, report
from peers import dropped_one_by_one

from qwen_jax.data.arc import parse_record
from qwen_jax.data.prompts import PromptEncoder, TokenizedSample, load_tokenizer

LENGTHS = (2048, 32_768)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(TOKENIZER))
    tasks = [parse_record(row) for row in long_rows(args.samples)]
    encoders = {length: PromptEncoder(tokenizer, max_seq_length=length) for length in LENGTHS}

    def ours(length: int) -> list[np.ndarray]:
        encoded = encoders[length].encode_many(enumerate(tasks))
        return [sample.token_ids for sample in encoded if isinstance(sample, TokenizedSample)]

    def peer(length: int) -> list[np.ndarray]:
        found = (dropped_one_by_one(tokenizer, task, length) for task in tasks)
        return [ids for ids in found if ids is not None]

    useful = {}
    for length in LENGTHS:
        samples = ours(length)
        useful[length] = sum(map(len, samples))
        for found, wanted in zip(samples, peer(length), strict=True):
            np.testing.assert_array_equal(found, wanted)
    cases = {
        (make, length): lambda make=make, length=length: make(length)
        for length in LENGTHS
        for make in (ours, peer)
    }
    seconds = interleave(cases, args.rounds)
    rows = []
    for length in LENGTHS:
        speed = {make: useful[length] / seconds[make, length] for make in (ours, peer)}
        rows += [
            (f"{length}: ours", f"{speed[ours]:,.0f} useful tokens/s"),
            (f"{length}: one by one", f"{speed[peer]:,.0f} useful tokens/s"),
            (f"{length}: ours / one by one", f"{speed[ours] / speed[peer]:.1f}"),
        ]
    report(f"Prompts of {len(tasks)} long tasks, {useful[LENGTHS[-1]]:,} tokens", rows)


if __name__ == "__main__":
    main()
