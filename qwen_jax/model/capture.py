"""A program with its weights on the devices: it compiles, starts steps, and brings what they give to the host."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.model.decoder import Decoder
from qwen_jax.model.program import BlockSums, Program, Sums
from qwen_jax.model.quantise import Stored

log = logging.getLogger(__name__)


def use_compilation_cache(folder: str | Path | None) -> None:
    """Keeps compiled programs in `folder`, so that a restart after a pre-emption compiles nothing; None: nowhere."""
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class StepInput(Protocol):
    """What a program needs of data.steps.Step."""

    @property
    def tokens_XT(self) -> np.ndarray: ...

    @property
    def positions_XT(self) -> np.ndarray: ...

    @property
    def kept_counts(self) -> np.ndarray: ...

    @property
    def kept_XR(self) -> np.ndarray | None: ...

    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def blocks(self) -> tuple[np.ndarray, np.ndarray]: ...


class TapRows(NamedTuple):
    """What one tap saw of a row in one step; R kept tokens, of which those behind the row's own mean nothing.

    stored: the activations [C, R, D] in the stored dtype, or the arrays of quantise.Quantised. of_rows and of_blocks:
    float32, as program.Sums has them without X; of the values that readers get.
    """

    stored: tuple[np.ndarray, ...]
    of_rows: tuple[np.ndarray, ...]
    of_blocks: tuple[np.ndarray, ...]


class RowResult(NamedTuple):
    """What one step gives of a row. log_probs_T: where they were asked for, in the order of Step.answers."""

    taps: dict[str, TapRows]
    log_probs_T: np.ndarray | None = None


class Compilation:
    """A program's step for each number of kept tokens (None: all), compiled on a thread of its own: at its first use,
    or begun before that, while the weights are loaded."""

    def __init__(self, program: Program):
        self.program = program
        self._steps: dict[int | None, Future[jax.stages.Compiled]] = {}

    def begin(self, kept: int | None = None) -> None:
        if kept not in self._steps:
            found = self._steps[kept] = Future()
            # Daemon: a compilation cannot be stopped, and must not keep a worker that was told to end.
            Thread(target=self._compile, args=(kept, found), name="compilation", daemon=True).start()

    def step(self, kept: int | None) -> jax.stages.Compiled:
        """Waits for it; raises what the compiler raised."""
        self.begin(kept)
        return self._steps[kept].result()

    def _compile(self, kept: int | None, found: Future[jax.stages.Compiled]) -> None:
        try:
            with self._announced(kept):
                found.set_result(self.program.lower_step(kept).compile())
        except BaseException as error:  # noqa: BLE001  (it is raised where the step is wanted)
            found.set_exception(error)

    @contextmanager
    def _announced(self, kept: int | None) -> Iterator[None]:
        """Says what is compiled, and for how long it has been, so that nobody takes that for a hang."""
        program = self.program
        notes = "" if kept is None else f", {kept} of them kept"
        what = f"the step of {program.shape.tokens} tokens{notes}"
        log.info("compiling %s: %d layers, %s attention", what, program.num_layers, program.form.name)
        started = time.monotonic()
        with _repeated(lambda: log.info("still compiling, for %.0f s", time.monotonic() - started)):
            yield
        log.info("compiled in %.1f s", time.monotonic() - started)


_SAID_EVERY_S = 30.0


@contextmanager
def _repeated(say: Callable[[], None]) -> Iterator[None]:
    """Calls `say` from a thread every half minute."""
    done = Event()

    def wait() -> None:
        while not done.wait(_SAID_EVERY_S):
            say()

    thread = Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Capture:
    """A program with its weights on the devices, and what goes on from step to step."""

    def __init__(self, compilation: Compilation, model: Decoder):
        """model: as weights.load_model gives it for the program's mesh."""
        self._compilation = compilation
        self._program = program = compilation.program
        self.params = nnx.split(model)[1]
        everywhere = NamedSharding(program.mesh, P())
        self._tables = jax.device_put(program.tables(), everywhere)
        self._carried = zeros_like(program.carried())
        self._rows = zeros_like(program.carried_rows())

    def __call__(self, step: StepInput) -> "Captured":
        """Starts one step and returns before it is done; the copy to the host is under way.

        Parameters never leave the devices.
        """
        captured = self.compute(step)
        captured.start_copying()
        return captured

    def compute(self, step: StepInput) -> "Captured":
        """The same, without the copy."""
        program, kept = self._program, step.kept_XR
        by_row = NamedSharding(program.mesh, P("data"))
        answers = step.answers() if program.with_answers else None
        blocks, *more = zip(*step.blocks(), strict=True)
        inputs = (step.tokens_XT, step.positions_XT, kept, answers, step.kept_counts, *blocks)
        compiled = self._compilation.step(None if kept is None else kept.shape[1])
        taps, sums, log_probs, self._carried, self._rows = compiled(
            self.params, self._tables, self._carried, self._rows, *jax.device_put(inputs, by_row)
        )
        more_sums = [program.sum_up_more(self._rows, taps, *jax.device_put(each, by_row)) for each in more]
        return Captured({tap: _leaving(taps[tap]) for tap in program.taps}, sums, more_sums, log_probs)


def _leaving(rows: jax.Array | Stored[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays that leave the device (TapRows.stored)."""
    return rows.quantised if isinstance(rows, Stored) else (rows,)


def zeros_like(shapes: Any) -> Any:
    """From the host, since making them on the device would compile a program for it."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)


@dataclass(frozen=True)
class Captured:
    """What a step gives, perhaps not yet computed. stored: in the order of the program's taps."""

    stored: dict[str, tuple[jax.Array, ...]]
    sums: dict[str, Sums]
    more_sums: Sequence[BlockSums]
    log_probs_XT: jax.Array | None

    def start_copying(self) -> None:
        for array in jax.tree.leaves((self.stored, self.sums, self.more_sums, self.log_probs_XT)):
            array.copy_to_host_async()

    def rows(self) -> list[RowResult]:
        """Waits for it. One entry for each row, its arrays views of what each device gave."""
        given = self.stored, self.sums, list(self.more_sums), self.log_probs_XT
        stored, sums, more_sums, log_probs = jax.tree.map(_by_row, given)

        def tap_rows(row: int, tap: str) -> TapRows:
            of_blocks = zip(sums[tap].of_blocks, *(more[tap] for more in more_sums), strict=True)
            return TapRows(
                tuple(array[row] for array in stored[tap]),
                tuple(array[row] for array in sums[tap].of_rows),
                tuple(np.concatenate([array[row] for array in arrays], axis=1) for arrays in of_blocks),
            )

        return [
            RowResult(
                {tap: tap_rows(row, tap) for tap in self.stored},
                None if log_probs is None else log_probs[row],
            )
            for row in range(len(next(iter(sums.values())).of_rows[0]))
        ]


class _Rows(list):
    """A list that jax's tree functions take for a leaf."""


def _by_row(array: jax.Array) -> _Rows:
    """Each row's part, from the first of the devices that hold it, without putting them together."""
    parts = {shard.index[0].start or 0: shard.data for shard in reversed(array.addressable_shards)}
    return _Rows(np.asarray(parts[row])[0] for row in sorted(parts))
