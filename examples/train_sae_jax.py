#!/usr/bin/env python3
"""Trains sparse autoencoders in JAX, on one layer's shards or on several layers at once. Needs: pip install optax

python examples/train_sae_jax.py activations --layers 3 7 11 --kind jumprelu --output suite

Started again, it goes on where it was saved last. What is saved takes activations as they are stored; SAELens loads
it with SAE.load_from_disk("suite/layer_07"). Letters in names: L layers, B batch, D model, F features.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_jax.reading import ActivationBatches, iter_activations

HELD_OUT_EVERY, BUFFER_BATCHES, DEAD_AFTER, BANDWIDTH, AUXILIARY = 10, 64, 200, 0.1, 1 / 32
Tree = dict[str, Any]


def above(pre_BF: jax.Array, threshold_F: jax.Array) -> jax.Array:
    """1 where a feature is above its threshold; its gradient is that of a ramp BANDWIDTH wide (Rajamanoharan 2024)."""
    ramp_BF = jnp.clip((jax.lax.stop_gradient(pre_BF) - threshold_F) / BANDWIDTH, -0.5, 0.5)
    return (pre_BF > threshold_F) + ramp_BF - jax.lax.stop_gradient(ramp_BF)


def begin(key: jax.Array, x_BD: jax.Array, args: Any, optimizer: Any) -> Tree:
    """Unit decoder rows, the encoder their transpose, the rows' mean as what is added to all."""
    scale = jnp.sqrt(x_BD.shape[1]) / jnp.linalg.norm(x_BD, axis=1).mean()
    W_dec = jax.random.normal(key, (args.d_sae, x_BD.shape[1]))
    W_dec /= jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    zeros_F, mean_D = jnp.zeros(args.d_sae), x_BD.mean(0) * scale
    params = {"W_enc": W_dec.T, "W_dec": W_dec, "b_enc": zeros_F, "b_dec": mean_D}
    if args.kind == "jumprelu":
        params["log_threshold"] = zeros_F + jnp.log(0.1)
    idle_F = zeros_F.astype(jnp.int32)
    return {"params": params, "opt_state": optimizer.init(params), "idle": idle_F, "scale": scale}


def encode(params: Tree, x_BD: jax.Array, args: Any) -> tuple[jax.Array, jax.Array]:
    """Features [B, F], and what they were chosen from."""
    pre_BF = (x_BD - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
    if args.kind == "topk":
        return keep_top(pre_BF, args.k), pre_BF
    return jax.nn.relu(pre_BF) * above(pre_BF, jnp.exp(params["log_threshold"])), pre_BF


def keep_top(pre_BF: jax.Array, k: int) -> jax.Array:
    least_B1 = jax.lax.stop_gradient(jax.lax.top_k(pre_BF, k)[0][:, -1:])
    return jnp.where(pre_BF >= least_B1, jax.nn.relu(pre_BF), 0)


def loss(params: Tree, x_BD: jax.Array, dead_F: jax.Array, progress: jax.Array, args: Any) -> tuple:
    """The reconstruction's error and what keeps features few (JumpReLU) or alive (TopK: Gao et al. 2024)."""
    features_BF, pre_BF = encode(params, x_BD, args)
    left_BD = x_BD - features_BF @ params["W_dec"] - params["b_dec"]
    error = jnp.square(left_BD).sum(1).mean()
    if args.kind == "jumprelu":
        count = above(pre_BF, jnp.exp(params["log_threshold"])).sum(1).mean()
        return error + args.l0 * jnp.minimum(1, 10 * progress) * count, features_BF
    revived_BF = keep_top(jnp.where(dead_F, pre_BF, -1.0), min(args.d_sae, 4 * args.k))
    again = jnp.square(jax.lax.stop_gradient(left_BD) - revived_BF @ params["W_dec"]).sum(1).mean()
    return error + AUXILIARY * jnp.where(dead_F.any(), again, 0), features_BF


def train_step(state: Tree, x_BD: jax.Array, step: jax.Array, args: Any, optimizer: Any) -> tuple:
    """One step of one layer's autoencoder; the decoder's rows stay of length 1."""
    dead_F, progress = state["idle"] >= DEAD_AFTER, step / args.steps
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, features_BF), grads = grad(state["params"], x_BD * state["scale"], dead_F, progress, args)
    updates, opt_state = optimizer.update(grads, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    params["W_dec"] /= jnp.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    idle_F = jnp.where((features_BF > 0).any(0), 0, state["idle"] + 1)
    return state | {"params": params, "opt_state": opt_state, "idle": idle_F}, value


def unexplained(state: Tree, x_BD: jax.Array, args: Any) -> jax.Array:
    """The share of the rows' variance that the reconstruction misses: 1 is as good as their mean."""
    params, x_BD = state["params"], x_BD * state["scale"]
    left_BD = x_BD - encode(params, x_BD, args)[0] @ params["W_dec"] - params["b_dec"]
    return jnp.square(left_BD).sum() / jnp.square(x_BD - x_BD.mean(0)).sum()


def read(args: Any, layer: int, size: int, held_out: bool, cursor: Any = None) -> ActivationBatches:
    """Shuffled batches of the samples that are held out, every tenth, or of the others."""

    def keep(sample: dict[str, Any]) -> np.ndarray:
        return np.full(len(sample["token_ids"]), (sample["sample_idx"] % HELD_OUT_EVERY == 0) == held_out)

    buffer, epochs = (4 * size, 1) if held_out else (BUFFER_BATCHES * size, 10**6)
    return iter_activations(args.path, layer, size, buffer, keep=keep, epochs=epochs, cursor=cursor)


def next_batch(readers: list[ActivationBatches], size: int) -> np.ndarray:
    """[L, B, D]: the same tokens in every layer. The smaller batches that end an epoch are left out."""
    while len((rows := [next(reader) for reader in readers])[0]) < size:
        pass
    return np.stack(rows)


def save_state(path: Path, state: Tree, step: int, readers: list[ActivationBatches]) -> None:
    named = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in named}
    unfinished = path.with_suffix(".unfinished")
    save_file(arrays, unfinished, {"at": json.dumps([step, [reader.cursor for reader in readers]])})
    unfinished.replace(path)


def load_state(path: Path, like: Tree) -> tuple[Tree, int, list[dict]]:
    with safe_open(path, framework="numpy") as file:
        named, tree = jax.tree_util.tree_flatten_with_path(like)
        leaves = [jnp.asarray(file.get_tensor(jax.tree_util.keystr(name))) for name, _ in named]
        return jax.tree_util.tree_unflatten(tree, leaves), *json.loads(file.metadata()["at"])


def save_for_sae_lens(folder: Path, state: Tree, layer: int, args: Any) -> None:
    """SAELens' files, with the scale that it was trained at folded into the weights."""
    weights = {name: np.array(value) for name, value in state["params"].items()}
    scale = np.asarray(state["scale"])
    weights["W_enc"] *= scale
    weights["W_dec"] /= scale
    weights["b_dec"] /= scale
    about = {"architecture": args.kind, "d_in": len(weights["b_dec"]), "d_sae": args.d_sae}
    about |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    about |= {"normalize_activations": "none", "reshape_activations": "none"}
    hook = f"blocks.{layer}.hook_resid_post"
    about["metadata"] = {"hook_name": hook, "sae_lens_version": "6.0.0"}  # the format's, not a package's
    if args.kind == "topk":
        about |= {"k": args.k, "rescale_acts_by_decoder_norm": False}
    else:
        weights["threshold"] = np.exp(weights.pop("log_threshold"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(about, indent=2) + "\n")


def learning_rate(args: Any, step: jax.Array) -> jax.Array:
    """Up in the first twentieth of the steps, down to nothing in the last fifth."""
    return args.lr * jnp.clip(jnp.minimum(20 * step, 5 * (args.steps - step)) / args.steps, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="shards: a worker's folder, a folder of these, or gs://...")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--kind", choices=["topk", "jumprelu"], default="topk")
    parser.add_argument("--d_sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32, help="features that are active at once (topk)")
    parser.add_argument("--l0", type=float, default=0.05, help="price of an active feature (jumprelu)")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save_every", type=int, default=500, help="steps")
    parser.add_argument("--output", type=Path, default="sae", help="folder for the trained autoencoders")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    optimizer, saved = optax.adam(partial(learning_rate, args)), args.output / "state.safetensors"

    def readers(size: int, held_out: bool, cursors: list[Any]) -> list[ActivationBatches]:
        return [read(args, layer, size, held_out, at) for layer, at in zip(args.layers, cursors, strict=True)]

    start, keys = [None] * len(args.layers), jax.random.split(jax.random.key(0), len(args.layers))
    held_out = np.stack([next(reader) for reader in readers(4096, True, start)])
    first = next_batch(readers(args.batch_size, False, start), args.batch_size)
    state = jax.vmap(partial(begin, args=args, optimizer=optimizer))(keys, first)
    measure = jax.jit(jax.vmap(partial(unexplained, args=args)))
    before, step = measure(state, held_out), 0
    if saved.exists():
        state, step, start = load_state(saved, state)
        print(f"going on behind step {step}")
    train = jax.vmap(partial(train_step, args=args, optimizer=optimizer), in_axes=(0, 0, None))
    train, training = jax.jit(train, donate_argnums=0), readers(args.batch_size, False, start)
    while step < args.steps:
        state, values = train(state, next_batch(training, args.batch_size), step)
        step += 1
        if step % args.save_every == 0 or step == args.steps:
            save_state(saved, state, step, training)
            print(f"step {step}: loss", *(f"{value:.4g}" for value in values))
    after, dead = measure(state, held_out), (state["idle"] >= DEAD_AFTER).sum(1)
    for place, layer in enumerate(args.layers):
        of_layer = jax.tree.map(lambda leaf: leaf[place], state)  # noqa: B023
        save_for_sae_lens(args.output / f"layer_{layer:02d}", of_layer, layer, args)
        left = f"{before[place]:.3f} before, {after[place]:.3f} after"
        print(f"layer {layer}: unexplained variance of held-out samples {left}; {dead[place]} features dead")


if __name__ == "__main__":
    main()
