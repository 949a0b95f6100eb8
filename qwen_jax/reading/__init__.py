"""Reading what workers wrote: samples, batches for training, checks. Needs numpy, isal and ml_dtypes only,
and google-cloud-storage for gs:// addresses; neither jax nor torch."""

from qwen_jax.reading.activations import ActivationBatches, Rows, iter_activations
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.reading.samples import iter_samples, load_shard

__all__ = ["ActivationBatches", "Rows", "Run", "iter_activations", "iter_samples", "load_shard", "open_runs"]
