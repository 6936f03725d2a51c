"""What the load test tells: a table of the answer times and of what gmux adds to them, as text and CSV; a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.figures import columns, quantile

SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}

#: The variant without gmux, which the others are compared with.
DIRECT = "direct"

HEADER = (
    *("users", "variant", "offered/s", "answered/s"),
    *SHARES,
    *(f"added {name}" for name in SHARES),
    *("failures", "note"),
)

#: Colours that the colour-blind tell apart (Okabe and Ito).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73")


@dataclass(frozen=True)
class Run:
    """One step of one variant; `times` are milliseconds. A variant is saturated when offered more than it can carry."""

    users: int
    variant: str
    offered: float
    seconds: float
    times: Sequence[float]
    is_saturated: bool = False
    is_load_bound: bool = False
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def answered(self) -> float:
        return len(self.times) / self.seconds

    def latency(self, name: str) -> float | None:
        """`p50` and the like; None when there was no answer."""
        return quantile(self.times, SHARES[name])

    def added(self, name: str, direct: Run) -> float | None:
        through, bare = self.latency(name), direct.latency(name)
        return None if self is direct or through is None or bare is None else through - bare


def write_table(runs: Sequence[Run], folder: Path) -> str:
    """Write table.txt and table.csv; the text."""
    table = rows(runs)
    text = columns(table)
    (folder / "table.txt").write_text(text + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(["" if cell == "-" else cell for cell in row] for row in table)
    return text


def rows(runs: Iterable[Run]) -> list[Sequence[str]]:
    """The header and a row for each run."""
    runs = list(runs)
    direct = {run.users: run for run in runs if run.variant == DIRECT}
    return [HEADER, *(_row(run, direct[run.users]) for run in runs)]


def _row(run: Run, direct: Run) -> list[str]:
    return [
        str(run.users),
        run.variant,
        f"{run.offered:g}",
        f"{run.answered:.1f}",
        *(_number(run.latency(name)) for name in SHARES),
        *(_number(run.added(name, direct)) for name in SHARES),
        str(sum(run.failures.values())),
        ", ".join(["saturated"] * run.is_saturated + ["locust is at its limit"] * run.is_load_bound),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(runs: Sequence[Run], title: str, folder: Path) -> None:
    """Write latency.png and latency.svg: answer time against users, a line for each variant, hollow where saturated."""
    # Here and not above: it takes half a second to load, and the command line may be wrong.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(title)
    both = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(both, ("p50", "p99"), strict=True):
        for variant, colour in zip(dict.fromkeys(run.variant for run in runs), COLOURS, strict=False):
            points = [(r.users, y, r.is_saturated) for r in runs if r.variant == variant and (y := r.latency(name))]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, label=variant)
            for x, y, is_hollow in points:
                axes.plot(x, y, "o", color=colour, markerfacecolor="white" if is_hollow else colour)
        axes.set(title=f"{name} of the answer time", xscale="log", yscale="log", xlabel="users")
        axes.set_xticks(sorted({run.users for run in runs}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(visible=True, alpha=0.3)
    both[0].set_ylabel("ms; hollow: more was offered than can be carried")
    both[0].legend()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"latency.{kind}")
