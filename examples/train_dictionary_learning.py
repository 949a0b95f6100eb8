#!/usr/bin/env python3
"""Trains a TopK autoencoder with dictionary_learning on one layer's shards. Needs: pip install dictionary-learning

python examples/train_dictionary_learning.py activations --layer 11 --output dictionary
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_jax.reading import iter_activations


def batches(path: str, layer: int, size: int, epochs: int) -> Iterator[torch.Tensor]:
    """Shuffled rows of the layer."""
    for rows in iter_activations(path, layer, size, shuffle_buffer=64 * size, epochs=epochs):
        yield torch.from_numpy(rows)


def unexplained(autoencoder: torch.nn.Module, rows: torch.Tensor) -> float:
    """The share of the rows' variance that the reconstruction misses: 1 is as good as their mean."""
    with torch.no_grad():
        left = (autoencoder(rows) - rows).square().sum()
    return float(left / (rows - rows.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="shards: a worker's folder, a folder of these, or gs://...")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--dict_size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32, help="features that are active at once")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="dictionary", help="folder for the trained autoencoder")
    args = parser.parse_args()

    probe = next(iter(batches(args.path, args.layer, args.batch_size, 1)))
    trainer = {
        "trainer": TopKTrainer,
        "activation_dim": probe.shape[1],
        "dict_size": args.dict_size,
        "k": args.k,
        "layer": args.layer,
        "lm_name": "qwen2.5",
        "device": args.device,
        "steps": args.steps,
        "warmup_steps": min(100, args.steps // 10),
    }
    trainSAE(
        data=batches(args.path, args.layer, args.batch_size, epochs=10_000),
        trainer_configs=[trainer],
        steps=args.steps,
        save_dir=args.output,
        log_steps=100,
        normalize_activations=True,
        device=args.device,
    )
    before = unexplained(AutoEncoderTopK(probe.shape[1], args.dict_size, args.k), probe)
    trained = Path(args.output) / "trainer_0" / "ae.pt"
    after = unexplained(AutoEncoderTopK.from_pretrained(str(trained), k=args.k), probe)
    print(f"unexplained variance: {before:.3f} before, {after:.3f} after; 1 is as good as the mean")
    print(f"saved in {trained}")


if __name__ == "__main__":
    main()
