"""The fleet as one self-contained HTML page."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from qwen_jax.fleet.monitor import ALIVE, PROBLEMS, SLOW, WorkerState, duration, problems_first
from qwen_jax.ledger.schema import COMPLETED

_STYLE = """
:root { color-scheme: light dark; --bar: #3b78c3; --bad: #c0392b; --slow: #b7791f; --done: #2e8b57; --line: #8884; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
.sub { opacity: .75; margin: .1rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; }
.tile { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
.tile b { display: block; font-size: 1.3rem; }
.problem { border-left: .3rem solid var(--bad); padding: .2rem .6rem; margin: .4rem 0; overflow-wrap: anywhere; }
.problem.slow { border-color: var(--slow); }
.worker { display: grid; grid-template-columns: 3.2rem 1fr 4rem; gap: .1rem .6rem; padding: .35rem 0;
  border-top: 1px solid var(--line); }
.share { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--line); border-radius: .3rem; height: 1.1rem; overflow: hidden; align-self: center; }
.bar i { display: block; height: 100%; background: var(--bar); }
.completed i { background: var(--done); } .failed i, .stalled i, .unreadable i { background: var(--bad); }
.slow i { background: var(--slow); }
.facts { grid-column: 2 / 4; font-size: .85rem; opacity: .85; overflow-wrap: anywhere; }
.failed .facts b, .stalled .facts b, .unreadable .facts b { color: var(--bad); } .slow .facts b { color: var(--slow); }
svg { width: 100%; max-width: 42rem; height: auto; } svg text { font-size: 12px; fill: currentColor; }
"""


def make_page(states: Sequence[WorkerState], now: float, refresh_s: float | None = None) -> str:
    """The page. refresh_s: the browser loads it again after so many seconds; None never."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:.0f}">' if refresh_s else ""
    when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}',
            f"<title>{len(states)} workers</title><style>{_STYLE}</style></head><body>",
            f'<h1>{len(states)} workers</h1><p class="sub">as of {when}</p>',
            _tiles(states),
            _problems(states),
            _throughput(states),
            _norms(states),
            "<h2>Workers</h2>",
            *map(_worker, problems_first(states)),
            "</body></html>",
            "",
        ]
    )


def _tiles(states: Sequence[WorkerState]) -> str:
    speeds = [state.tokens_per_second for state in states if state.tokens_per_second is not None]
    size = sum(state.bytes or 0 for state in states)
    tiles = [
        _progress_tile(states),
        (f"{sum(state.state == COMPLETED for state in states)} of {len(states)}", COMPLETED),
        (str(sum(state.state in PROBLEMS for state in states)), "with problems"),
        (f"{sum(speeds):,.0f}" if speeds else "?", "tokens/s"),
        _end_tile(states),
        (f"{size / 1e9:,.1f}", "GB stored"),
    ]
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b>{name}</div>' for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


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


def _problems(states: Sequence[WorkerState]) -> str:
    found = [state for state in problems_first(states) if state.state in (*PROBLEMS, SLOW)]
    lines = [
        f'<div class="problem {state.state}"><b>Worker {state.worker} {state.state}</b>: '
        f"{escape(state.message or '?')}</div>"
        for state in found
    ]
    return "<h2>Problems</h2>" + "".join(lines) if lines else ""


def _worker(state: WorkerState) -> str:
    width = 100 * (state.share or 0.0)
    facts = dict(state.facts)
    share = facts.pop("%", None)
    if state.state == COMPLETED:
        facts.pop("last shard", None)
    words = [
        f"<b>{state.state.replace('_', ' ')}</b>",
        *(_WORDS[name].format(text) for name, text in facts.items()),
    ]
    return (
        f'<div class="worker {state.state}"><span>{state.worker}</span>'
        f'<div class="bar"><i style="width:{width:.1f}%"></i></div>'
        f'<span class="share">{"?" if share is None else f"{share} %"}</span>'
        f'<div class="facts">{" · ".join(words)}</div></div>'
    )


_WORDS = {
    "samples": "{} samples",
    "shards": "{} shards",
    "GB": "{} GB",
    "tokens/s": "{} tokens/s",
    "ETA": "{} left",
    "last shard": "last shard {}",
}
_STEPS = 60


def _throughput(states: Sequence[WorkerState]) -> str:
    """All workers' tokens/s over time, in up to 60 steps, as far as all that run have reported.

    It begins where a quarter of them had: one that lay idle for days must not squeeze the others' hours.
    """
    histories = [state.history for state in states if len(state.history) > 1]
    live = [state.history for state in states if len(state.history) > 1 and state.state in ALIVE] or histories
    if not histories:
        return ""
    first = sorted(history[0][0] for history in live)[len(live) // 4]
    last = (min if live is not histories else max)(history[-1][0] for history in live)
    width = max((last - first) / _STEPS, 1.0)
    ends = [first + step * width for step in range(int((last - first) / width) + 1)]
    totals = [sum(_tokens_at(history, when) for history in histories) for when in ends]
    speeds = [(after - before) / width for before, after in itertools.pairwise(totals)]
    if len(speeds) < 2:
        return ""
    hours = [step * width / 3600 for step in range(len(speeds))]
    began = datetime.fromtimestamp(first, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "<h2>Throughput</h2>" + _chart(
        [("all workers", hours, speeds)], f"hours since {began}", "tokens/s"
    )


def _tokens_at(history: list[list[float]], when: float) -> float:
    """Tokens done by then, between two points in proportion."""
    if when <= history[0][0]:
        return history[0][2]
    for before, after in itertools.pairwise(history):
        if when <= after[0]:
            return before[2] + (after[2] - before[2]) * (when - before[0]) / max(after[0] - before[0], 1e-9)
    return history[-1][2]


def _norms(states: Sequence[WorkerState]) -> str:
    known = [state for state in states if len(state.layer_norms) > 1]
    if not known:
        return ""
    layers = [int(layer) for layer in known[0].layer_norms]
    alike = [state for state in known if list(state.layer_norms) == list(known[0].layer_norms)]
    columns = [sorted(state.layer_norms[str(layer)] for state in alike) for layer in layers]
    lines = [
        ("largest worker", layers, [column[-1] for column in columns]),
        ("median worker", layers, [column[len(column) // 2] for column in columns]),
        ("smallest worker", layers, [column[0] for column in columns]),
    ]
    return "<h2>Mean norm by layer</h2>" + _chart(lines, "layer", "mean norm")


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 440, 200, 48, 40
_COLOURS = ("#3b78c3", "#2e8b57", "#b7791f")


def _chart(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> str:
    left, right = min(min(xs) for _, xs, _ in lines), max(max(xs) for _, xs, _ in lines)
    top = max(max(ys) for _, _, ys in lines) or 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / max(right - left, 1e-9) * (_WIDTH - _LEFT - 10)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - 24):.1f}"

    def text(x: str | float, y: str | float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    parts = []
    for number, (colour, (name, xs, ys)) in enumerate(zip(_COLOURS, lines, strict=False)):
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(lines) > 1:
            parts.append(text(_LEFT + 8 + 125 * number, 14, name, f'style="fill:{colour}"'))
    for share in (0.0, 0.5, 1.0):
        x, y = left + share * (right - left), share * top
        across, level = place(x, y).split(",")
        parts.append(text(_LEFT - 6, float(level) + 4, _short(y), 'text-anchor="end"'))
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{level}" y2="{level}" stroke="currentColor" opacity=".2"/>'
        )
        anchor = "end" if share == 1.0 else "middle"
        parts.append(text(across, _HEIGHT - 22, _short(x), f'text-anchor="{anchor}"'))
    parts.append(text((_WIDTH + _LEFT) / 2, _HEIGHT - 4, f"{x_label}; up: {y_label}", 'text-anchor="middle"'))
    label = f'role="img" aria-label="{y_label} by {x_label}"'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {label}>{"".join(parts)}</svg>'


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
