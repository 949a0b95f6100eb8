"""Rows in a byte a value: on the device, so that only this leaves it.

Each row by itself, so that a sample's bits stay its own: its EXACT_CHANNELS values of the largest size are set aside as
they are, of equals those of the lowest channels, and the others become codes times one scale, which makes the largest
of them the dtype's largest code.
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from qwen_jax.kinds import EXACT_CHANNELS, STORED_DTYPES

_MANTISSA_BITS, _LEAST_NORMAL = 3, 2.0**-6
"""Of float8_e4m3fn."""
_LEAST = 2.0**-100
"""What is smaller counts as nothing: the inverse of its scale would be no float32."""


Array = TypeVar("Array")
"""jax.Array, or what stands for one."""


class Quantised(NamedTuple, Generic[Array]):
    """Rows as they are stored; values_CRK, in the dtype that they were computed in, stand at channels_CRK, int32."""

    codes_CRD: Array
    scale_CR: Array
    channels_CRK: Array
    values_CRK: Array


class Stored(NamedTuple, Generic[Array]):
    """Rows as they were computed and as they are stored."""

    computed_CRD: Array
    quantised: Quantised[Array]


def quantise(x_CRD: jax.Array, dtype: str) -> Quantised[jax.Array]:
    """dtype: of the codes, one of STORED_DTYPES that is quantised. A layer at a time, which bounds what it takes."""
    return Quantised(*jax.lax.map(lambda x_RD: _quantise_layer(x_RD, dtype), x_CRD))


def _quantise_layer(x_RD: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
    largest = STORED_DTYPES[dtype].largest
    wide_RD, size_RD = x_RD.astype(jnp.float32), jnp.abs(x_RD.astype(jnp.float32))
    channels, values = [], []
    for _ in range(EXACT_CHANNELS):
        channels.append(jnp.argmax(size_RD, axis=1).astype(jnp.int32))  # the first of equals
        here_RD = _is_channel(x_RD, channels[-1])
        # A maximum and no gather, which is slow on a TPU; it keeps the bits of every value.
        values.append(jnp.max(jnp.where(here_RD, x_RD, -jnp.inf), axis=1))
        size_RD = jnp.where(here_RD, -1, size_RD)
    most_R = size_RD.max(axis=1)
    most_R = jnp.where(most_R < _LEAST, 0, most_R)
    # Times the inverse, and not divided, which compilers do in the one way or the other.
    inverse_R = jnp.where(most_R == 0, 0, largest / most_R)
    scaled_RD = jnp.where(size_RD >= 0, wide_RD * inverse_R[:, None], 0)
    codes_RD = jnp.clip(_rounded(scaled_RD, dtype), -largest, largest).astype(dtype)
    return codes_RD, most_R / largest, jnp.stack(channels, axis=1), jnp.stack(values, axis=1)


def _is_channel(x_RD: jax.Array, channel_R: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_RD.shape, x_RD.ndim - 1) == channel_R[..., None]


def _rounded(x: jax.Array, dtype: str) -> jax.Array:
    """To the nearest values of the dtype, of two as near the even one; by hand, since devices cast to eight bits in
    different ways, some of them in two steps."""
    if dtype == "int8":
        return jnp.round(x)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA_BITS)
    spacing = _LEAST_NORMAL / 2**_MANTISSA_BITS
    return jnp.where(jnp.abs(x) < _LEAST_NORMAL, jnp.round(x / spacing) * spacing, normal)


def restored(rows: Quantised[jax.Array]) -> jax.Array:
    """float32, the values that readers get (shards.rows.restored); computed where they are wanted, never stored."""
    x_CRD = rows.codes_CRD.astype(jnp.float32) * rows.scale_CR[..., None]
    for k in range(EXACT_CHANNELS):
        here_CRD = _is_channel(x_CRD, rows.channels_CRK[..., k])
        x_CRD = jnp.where(here_CRD, rows.values_CRK[..., k, None].astype(jnp.float32), x_CRD)
    return x_CRD


def values_of(rows: jax.Array | Stored[jax.Array]) -> jax.Array:
    """float32, what readers get of rows."""
    return restored(rows.quantised) if isinstance(rows, Stored) else rows.astype(jnp.float32)


def loss_sums(rows: Stored[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[C, R] float32 each, of a row x and what is restored of it, x - e: the sums of x squared, of x times e and of e
    squared. The cosine follows from them without a difference of nearly equal numbers (shards.statistics)."""
    x_CRD = rows.computed_CRD.astype(jnp.float32)
    e_CRD = x_CRD - restored(rows.quantised)
    return jnp.square(x_CRD).sum(-1), (x_CRD * e_CRD).sum(-1), jnp.square(e_CRD).sum(-1)
