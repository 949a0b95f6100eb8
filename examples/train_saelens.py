#!/usr/bin/env python3
"""Trains a sparse autoencoder with SAELens on one layer's shards. Needs: pip install sae-lens

python examples/train_saelens.py activations --layer 11 --output sae
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_jax.reading import iter_activations


def batches(path: str, layer: int, size: int, epochs: int, scale: float) -> Iterator[torch.Tensor]:
    """Shuffled rows of the layer, scaled, in random order."""
    for rows in iter_activations(path, layer, size, shuffle_buffer=64 * size, epochs=epochs):
        if len(rows) == size:
            yield torch.from_numpy(rows * scale)


def unexplained(sae: torch.nn.Module, rows: torch.Tensor) -> float:
    """The share of the rows' variance that the reconstruction misses: 1 is as good as their mean."""
    with torch.no_grad():
        left = (sae(rows) - rows).square().sum()
    return float(left / (rows - rows.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="shards: a worker's folder, a folder of these, or gs://...")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--d_sae", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=2_000_000, help="rows to train on")
    parser.add_argument("--l1", type=float, default=0.02)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", default="sae", help="folder for the trained SAE")
    args = parser.parse_args()

    first = next(iter(iter_activations(args.path, args.layer, args.batch_size, shuffle_buffer=4096, seed=1)))
    scale = float((first.shape[1] / (first**2).sum(axis=1).mean()) ** 0.5)  # mean squared norm: the width
    probe = torch.from_numpy(first * scale)
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=first.shape[1], d_sae=args.d_sae, l1_coefficient=args.l1)
    )
    before = unexplained(sae, probe)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=args.samples,
            train_batch_size_samples=args.batch_size,
            lr=args.lr,
            lr_end=args.lr / 10,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(args.path, args.layer, args.batch_size, epochs=10_000, scale=scale),
    )
    trainer.fit()
    sae.save_inference_model(args.output)
    after = unexplained(SAE.load_from_disk(args.output), probe)
    print(f"unexplained variance: {before:.3f} before, {after:.3f} after; 1 is as good as the mean")
    print(f"saved in {args.output}; multiply activations by {scale:.6g} before they go in")


if __name__ == "__main__":
    main()
