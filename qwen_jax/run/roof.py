"""What a step takes of a device, by formulas: memory, operations and bytes, and which of the device's limits it meets.

Held against what TPU's own compiler says in tests/tpu. A formula knows no launch times, waits or padded shapes: the
speed that it gives is a bound, of which a share is expected (--roof_share).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from qwen_jax.accelerators import Accelerator
from qwen_jax.data.steps import StepShape
from qwen_jax.data.streams import StreamSummary
from qwen_jax.errors import ConfigError
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.program import Program
from qwen_jax.model.rollout import slot_bytes
from qwen_jax.model.sharding import check_split, planned_mesh
from qwen_jax.model.source import ModelSource
from qwen_jax.run.job import Outline, choose_layers
from qwen_jax.run.pipeline import STEPS_IN_FLIGHT
from qwen_jax.settings import LONGEST, Settings

_RESERVED = 0.05
"""Share of a device's memory that is left for the runtime and for what lies badly."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device. steps: captured activations of the steps in flight. temporaries: while a step runs; its
    statistics take less. slots: of rollouts."""

    weights: int
    carried: int
    steps: int
    temporaries: int
    slots: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.carried + self.steps + self.temporaries + self.slots


@dataclass(frozen=True)
class Roof:
    """What the steps of a program take of each device of a machine.

    context: keys that a query sees, on average. kept: share of the tokens that are kept.
    """

    program: Program[StepShape]
    machine: Accelerator
    context: float
    kept: float = 1.0

    @property
    def _bytes(self) -> int:
        return jnp.dtype(self.program.dtype).itemsize

    @property
    def flops(self) -> float:
        """Of a step: the products of the layers with their weights, and attention's own."""
        config, each = self.program.config, self.program.parts.count
        D, F, H, N = config.hidden_size, config.intermediate_size, config.head_dim, config.num_heads
        kv_heads = self.program.parts.kv_heads_each(config.num_kv_heads)
        weights = (2 * N * H * D + 3 * D * F) / each + 2 * kv_heads * H * D
        attention = 2 * N * H * self.context / each
        return 2 * self.program.shape.tokens * self.program.num_layers * (weights + attention)

    @property
    def leaving(self) -> float:
        """Bytes of a step that go to the host; of the devices that share the weights one sends them."""
        return self.kept * captured_bytes(self.program)

    @property
    def moved(self) -> float:
        """Bytes of a step between memory and the units that compute: weights once, what is carried in and out, what is
        captured, and of each layer its streams (read and written twice) and the mlp's width (written and read)."""
        program, config = self.program, self.program.config
        width = 8 * config.hidden_size + 4 * config.intermediate_size / program.parts.count
        layers = program.num_layers * program.shape.tokens * width * self._bytes
        captured = self.kept * held_bytes(program)
        return program.weight_bytes + 2 * program.carried_bytes + captured + layers

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of a step, at the full speed of each part."""
        chip = self.machine.chip
        flops = chip.flops if self.program.dtype == "bfloat16" else chip.flops / _FLOAT32_PASSES
        return {
            "matrix units": self.flops / flops,
            "device memory": self.moved / chip.bandwidth,
            "host link": self.leaving / chip.host_link,
        }

    @property
    def bound(self) -> str:
        """The part that a step waits for."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def tokens_per_second(self, share: float) -> float:
        """Of the machine, at that share of the full speed."""
        return share * self.program.shape.per_step / self.seconds[self.bound]

    @property
    def spare(self) -> float:
        """Bytes of each device that are left, below 0 where the program does not fit."""
        return (1 - _RESERVED) * self.machine.chip.memory - device_memory(self.program, self.machine).total


_FLOAT32_PASSES = 6
"""Products of bfloat16 parts that make one of float32 at the highest precision, which float32 runs at."""


def device_memory(program: Program, machine: Accelerator | None = None) -> DeviceMemory:
    """machine: None for one that is not in the table, as this one."""
    copied = program.layer_bytes if machine is not None and machine.chip.copies_layers else 0
    return DeviceMemory(
        program.weight_bytes,
        program.carried_bytes,
        (1 + STEPS_IN_FLIGHT) * held_bytes(program),
        _temporary_bytes(program) + copied,
        slot_bytes(program),
    )


def captured_bytes(program: Program) -> int:
    """Activations that leave each device in a step of which all tokens are kept."""
    return _bytes_of(program.stored_rows(program.shape.tokens))


def held_bytes(program: Program) -> int:
    """The same with what a step computes of them before they are quantised, which is there beside them."""
    return _bytes_of(program.rows_to_sum(program.shape.tokens))


def _bytes_of(rows: Any) -> int:
    """Of a device's own row."""
    return sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in jax.tree.leaves(rows))


def _temporary_bytes(program: Program) -> int:
    """While a layer is computed: both inputs of the mlp's product, and the layer's keys and values, old and new."""
    shape, config, each = program.shape, program.config, program.parts.count
    mlp = 2 * shape.tokens * config.intermediate_size // each
    kv_heads = program.parts.kv_heads_each(config.num_kv_heads)
    seen = shape.positions + shape.tokens
    keys = sum(map(math.prod, program.form.carried_shapes(seen, kv_heads, config.head_dim)))
    return jnp.dtype(program.dtype).itemsize * (mlp + keys)


def machine_mesh(machine: Accelerator, model_parallel: int) -> AbstractMesh:
    return planned_mesh(machine.devices, model_parallel, f"devices of {machine.name}")


def as_on_an_accelerator(settings: Settings) -> Settings:
    """Where the compute dtype is `auto`, what that means there (capture.resolve_dtype)."""
    return replace(settings, dtype="bfloat16") if settings.dtype == "auto" else settings


def outline_of_config(settings: Settings, config: ModelConfig) -> Outline:
    """What the settings come to with that model on an accelerator, where neither stream nor model are at hand."""
    dtype = as_on_an_accelerator(settings).dtype
    stored = dtype if settings.activation_dtype == "auto" else settings.activation_dtype
    layers = choose_layers(settings.layers_to_extract, config.num_layers)
    if settings.max_seq_length == LONGEST:  # the longest that it can come to
        settings = replace(settings, max_seq_length=config.max_positions)
    nowhere = ModelSource(settings.model_path, "", Path())
    return Outline(settings, nowhere, config, StreamSummary("", 0), layers, dtype, stored)


def complaint(outline: Outline, machine: Accelerator) -> str | None:
    """Why the step cannot fit that machine, and what would; None where it does."""
    try:
        program = _program(outline, machine)
    except ConfigError as error:
        return str(error)
    if Roof(program, machine, context=1).spare >= 0:
        return None
    needed, have = device_memory(program, machine).total / 1e9, machine.chip.memory / 1e9
    advice = " or ".join(what_would_fit(outline, machine)) or "fewer layers, or a machine with more memory"
    return f"needs about {needed:.1f} GB of the {have:.1f} GB of each device of {machine.name}; would fit: {advice}"


def _program(outline: Outline, machine: Accelerator) -> Program:
    """Raises ConfigError where the machine's devices cannot share the model so."""
    parts = outline.settings.model_parallel
    check_split(outline.config, parts)
    return outline.program(machine_mesh(machine, parts), machine.platform)


def what_would_fit(outline: Outline, machine: Accelerator) -> Iterator[str]:
    """The nearest value of each setting that alone makes the step fit; where none does, the nearest two that do."""
    now = outline.settings
    nearest = {
        "batch_size": [now.batch_size >> n for n in range(1, now.batch_size.bit_length())],
        "model_parallel": range(now.model_parallel + 1, machine.devices + 1),
        "max_seq_length": [now.max_seq_length >> n for n in range(1, 6)],
    }
    changes: list[list[dict[str, Any]]] = [
        [{name: value} for value in values] for name, values in nearest.items()
    ]
    found = [change for change in (_first_that_fits(outline, machine, each) for each in changes) if change]
    if not found:
        both = [{"model_parallel": n, "batch_size": 1} for n in nearest["model_parallel"]]
        found = [change] if (change := _first_that_fits(outline, machine, both)) else []
    for change in found:
        yield " ".join(f"--{name} {value}" for name, value in change.items())


def _first_that_fits(outline: Outline, machine: Accelerator, changes: list[dict[str, Any]]) -> dict[str, Any]:
    for change in changes:
        if _fits(replace(outline, settings=replace(outline.settings, **change)), machine):
            return change
    return {}


def _fits(outline: Outline, machine: Accelerator) -> bool:
    try:
        return Roof(_program(outline, machine), machine, context=1).spare >= 0
    except ConfigError:
        return False
