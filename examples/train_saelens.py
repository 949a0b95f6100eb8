#!/usr/bin/env python3
"""Trains a sparse autoencoder with SAELens on one layer's shards. Needs: pip install sae-lens

What is saved takes activations as they are stored: the scale that it was trained at is folded into its weights.

python examples/train_saelens.py activations --layer 11 --output sae
"""

import argparse

import torch
from recipe import held_out_rows, report, training_rows, unexplained
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer


class Trainer(SAETrainer):
    """SAELens' trainer, which keeps the losses."""

    def __init__(self, **kwargs: object):
        super().__init__(**kwargs)
        self.losses: list[float] = []

    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        output = super().step(batch)
        self.losses.append(output.loss.item())
        return output


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

    torch.manual_seed(0)
    probe = held_out_rows(args.path, args.layer, 4096)
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=probe.shape[1],
            d_sae=args.d_sae,
            l1_coefficient=args.l1,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(hook_name=f"blocks.{args.layer}.hook_resid_post"),
        )
    )
    before = unexplained(sae, probe)
    trainer = Trainer(
        cfg=SAETrainerConfig(
            total_training_samples=args.samples,
            train_batch_size_samples=args.batch_size,
            n_batches_for_norm_estimate=16,
            lr=args.lr,
            lr_end=args.lr / 10,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=training_rows(args.path, args.layer, args.batch_size, epochs=10_000),
    )
    trainer.fit()
    sae.save_inference_model(args.output)
    report(trainer.losses, before, unexplained(SAE.load_from_disk(args.output), probe))
    print(f"saved in {args.output}; it takes activations as they are stored")


if __name__ == "__main__":
    main()
