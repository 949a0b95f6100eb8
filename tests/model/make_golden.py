"""Writes tests/model/golden: a tiny checkpoint and Hugging Face's taps of it.

Run: python -m tests.model.make_golden
"""

from pathlib import Path

import numpy as np

from tests.hf_reference import make_reference, reference_taps, save_reference

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    model = make_reference(56, 64, 2, 14, 2, 61, True, seed=3)
    tokens = np.random.default_rng(3).integers(0, 61, (2, 11), np.int32)
    save_reference(model, GOLDEN)
    (GOLDEN / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(GOLDEN / "taps.npz", tokens=tokens, **reference_taps(model, tokens))


if __name__ == "__main__":
    main()
