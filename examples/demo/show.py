#!/usr/bin/env python3
"""Shows what the demo wrote and how to read it (the last step of ./launch_worker.sh --demo)."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.demo.make_stream import TRAINED, kind_of
from qwen_jax.reading import iter_samples
from qwen_jax.shards import load_shard

HOW_TO_READ = """
Read a shard:
    from qwen_jax.shards import load_shard    # safe for shards from strangers
    data = load_shard("{shard}")
    data[{layer}][0]["activation"]            # {dtype} [n_tokens, hidden] of layer {layer}, first sample
Or with the standard library alone (only for shards that you made yourself):
    import gzip, pickle
    with gzip.open("{shard}", "rb") as f:
        data = pickle.load(f)

For your own model and data: README.md, docs/guide.md.
"""


def answers_by_kind(folder: Path) -> dict[str, tuple[int, int, float]]:
    """Of each kind of task: how many there are, how many the model's own answers solve, and the mean log-probability
    (nats) of a token of these answers."""
    answers = defaultdict(list)
    for sample in iter_samples(folder, layers=[0]):
        answers[kind_of(sample["task_id"])].append((sample["solved"], sample["answer_logprobs"].mean()))
    return {
        kind: (len(of), sum(solved for solved, _ in of), float(np.mean([mean for _, mean in of])))
        for kind, of in answers.items()
    }


def show_answers(folder: Path) -> None:
    print("\nThe model's own answers, to tasks that it was not trained on (examples/demo/train_model.py):")
    print("  kind       solved    mean log-probability of a token of its answer, right or wrong")
    for kind, (count, solved, mean) in answers_by_kind(folder).items():
        note = "" if kind in TRAINED else "  a kind that it never saw"
        print(f"  {kind:10} {solved:2} of {count}  {mean:8.4f}{note}")


def main(root: str) -> None:
    folder = Path(root) / "bucket" / "activations" / "tpu_0"
    metadata = json.loads((folder / "metadata.json").read_text())
    totals = metadata["totals"]
    print(f"\nThe bucket ({folder}):")
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            print(f"  {path.name:32} {path.stat().st_size:>10,} bytes")
    print(f"\n{totals['samples']} samples, {totals['tokens']} tokens, layers {metadata['layers']}, "
          f"{metadata['activation_dtype']}; a layer is: {metadata['layer_meaning']}")  # fmt: skip
    shard = folder / metadata["shards"][0]["filename"]
    layer = metadata["layers"][-1]
    record = load_shard(shard)[layer][0]
    print(f"\n{shard.name}, layer {layer}, first sample: task {record['task_id']!r}, "
          f"activation {record['activation'].dtype} {record['shape']}")  # fmt: skip
    show_answers(folder)
    print(HOW_TO_READ.format(shard=shard, layer=layer, dtype=metadata["activation_dtype"]))


if __name__ == "__main__":
    main(sys.argv[1])
