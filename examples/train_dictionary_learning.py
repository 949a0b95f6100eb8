#!/usr/bin/env python3
"""Trains a TopK autoencoder with dictionary_learning on one layer's shards. Needs: pip install dictionary-learning

python examples/train_dictionary_learning.py activations --layer 11 --output dictionary
"""

import argparse
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from recipe import held_out_rows, report, training_rows, unexplained


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

    torch.manual_seed(0)
    losses: list[float] = []

    class Trainer(TopKTrainer):
        """dictionary_learning's trainer, which keeps the losses: trainSAE makes it and does not give it back."""

        def update(self, step: int, x: torch.Tensor) -> float:
            losses.append(super().update(step, x))
            return losses[-1]

    probe = held_out_rows(args.path, args.layer, 4096)
    trainer = {
        "trainer": Trainer,
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
        data=training_rows(args.path, args.layer, args.batch_size, epochs=10_000),
        trainer_configs=[trainer],
        steps=args.steps,
        save_dir=args.output,
        log_steps=100,
        normalize_activations=True,
        device=args.device,
    )
    trained = Path(args.output) / "trainer_0" / "ae.pt"
    before = unexplained(AutoEncoderTopK(probe.shape[1], args.dict_size, args.k), probe)
    report(losses, before, unexplained(AutoEncoderTopK.from_pretrained(str(trained), k=args.k), probe))
    print(f"saved in {trained}")


if __name__ == "__main__":
    main()
