"""The fleet as one self-contained HTML page."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from qwen_jax.fleet.monitor import ALIVE, PROBLEMS, SLOW, WorkerState, duration, problems_first
from qwen_jax.ledger.schema import COMPLETED

_TEMPLATE = "page.html.jinja"
_MOST_STEPS = 60


def make_page(
    states: Sequence[WorkerState], now: float, refresh_s: float | None = None, where: str = ""
) -> str:
    """The page. refresh_s: the browser loads it again after so many seconds; None never. where: where the workers'
    files are, for the title."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = environment.from_string(files("qwen_jax.fleet").joinpath(_TEMPLATE).read_text("utf-8"))
    return template.render(
        title=_title(states, where),
        when=_date(now),
        refresh_s=refresh_s,
        tiles=list(_tiles(states)),
        problems=[state for state in problems_first(states) if state.state in (*PROBLEMS, SLOW)],
        throughput=throughput(states),
        norms=list(_norms(states)),
        workers=[(state, *_facts(state)) for state in problems_first(states)],
    )


def _title(states: Sequence[WorkerState], where: str) -> str:
    models = sorted({state.model for state in states if state.model})
    return ", ".join([f"{len(states)} workers", *models, *([where] if where else [])])


def _date(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _tiles(states: Sequence[WorkerState]) -> Iterator[tuple[str, str]]:
    """What is known of all together, and what it is."""
    speeds = [state.tokens_per_second for state in states if state.tokens_per_second is not None]
    yield _progress_tile(states)
    yield f"{sum(state.state == COMPLETED for state in states)} of {len(states)}", COMPLETED
    yield str(sum(state.state in PROBLEMS for state in states)), "with problems"
    yield f"{sum(speeds):,.0f}" if speeds else "?", "tokens/s"
    yield _end_tile(states)
    yield f"{sum(state.bytes or 0 for state in states) / 1e9:,.1f}", "GB stored"


def _progress_tile(states: Sequence[WorkerState]) -> tuple[str, str]:
    """Over all workers; a stream of unknown length counts as long as the mean of the others."""
    totals = [state.total for state in states if state.total]
    if not totals:
        return "?", "of the samples"
    everything = sum(totals) * len(states) / len(totals)
    share = min(sum(state.samples for state in states) / everything, 1.0)
    guessed = len(states) - len(totals)
    note = f"; {guessed} streams of unknown length" if guessed else ""
    return f"{100 * share:.1f} %", f"of the samples{note}"


def _end_tile(states: Sequence[WorkerState]) -> tuple[str, str]:
    """When the last of those that run is done, and how many others are not on their way there."""
    etas = [state.eta_s for state in states if state.eta_s is not None]
    others = sum(state.state != COMPLETED and state.eta_s is None for state in states)
    note = f"; {others} others give no time" if others else ""
    return duration(max(etas)) if etas else "?", f"until the last that runs is done{note}"


_WORDS = {
    "samples": "{} samples",
    "shards": "{} shards",
    "GB": "{} GB",
    "tokens/s": "{} tokens/s",
    "ETA": "{} left",
    "last shard": "last shard {}",
}


def _facts(state: WorkerState) -> tuple[str | None, list[str]]:
    """The share in %, and the other facts in words."""
    facts = dict(state.facts)
    share = facts.pop("%", None)
    if state.state == COMPLETED:
        facts.pop("last shard", None)
    return share, [_WORDS[name].format(text) for name, text in facts.items()]


@dataclass(frozen=True)
class Throughput:
    """All workers' tokens/s over time, in steps of equal length."""

    speeds: list[float]
    first: float
    seconds: float

    @property
    def most(self) -> float:
        return max(self.speeds)

    @property
    def began(self) -> str:
        return _date(self.first)

    @property
    def lasted(self) -> str:
        return duration(self.seconds)


def throughput(states: Sequence[WorkerState]) -> Throughput | None:
    """In up to 60 steps, as far as all that run have reported; None where nobody has.

    It begins where a quarter of them had: one that lay idle for days must not squeeze the others' hours.
    """
    histories = [state.history for state in states if len(state.history) > 1]
    live = [state.history for state in states if len(state.history) > 1 and state.state in ALIVE] or histories
    if not histories:
        return None
    first = sorted(history[0][0] for history in live)[len(live) // 4]
    last = (min if live is not histories else max)(history[-1][0] for history in live)
    width = max((last - first) / _MOST_STEPS, 1.0)
    ends = [first + step * width for step in range(int((last - first) / width) + 1)]
    totals = [sum(_tokens_at(history, when) for history in histories) for when in ends]
    speeds = [(after - before) / width for before, after in itertools.pairwise(totals)]
    return Throughput(speeds, first, len(speeds) * width) if len(speeds) > 1 else None


def _tokens_at(history: list[list[float]], when: float) -> float:
    """Tokens done by then, between two points in proportion."""
    if when <= history[0][0]:
        return history[0][2]
    for before, after in itertools.pairwise(history):
        if when <= after[0]:
            return before[2] + (after[2] - before[2]) * (when - before[0]) / max(after[0] - before[0], 1e-9)
    return history[-1][2]


def _norms(states: Sequence[WorkerState]) -> Iterator[tuple[str, list[float]]]:
    """Of each layer the smallest, the median and the largest worker's mean norm."""
    known = [state for state in states if len(state.layer_norms) > 1]
    alike = [state for state in known if list(state.layer_norms) == list(known[0].layer_norms)]
    for layer in known[0].layer_norms if known else ():
        column = sorted(state.layer_norms[layer] for state in alike)
        yield layer, [column[0], column[len(column) // 2], column[-1]]
