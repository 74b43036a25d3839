"""Result rows (see `linear_run`) as lines of text: a table, the targets, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.linear_cases import TARGETS, Target, Verdict, judge
from tests.benchmarks.peers_adapter import EAGER, PEERS

Row = Mapping[str, Any]


def number(value: float | None, width: int = 8) -> str:
    """A time in as many digits as its size deserves."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:{width}.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


@dataclass(frozen=True)
class Report:
    """How the rows of one benchmark are printed. width: of a name. beside: what else has a column, peers for instance.

    base_name: whether the row says which of several implementations is its base.
    """

    width: int
    legend: str
    beside: Sequence[str]
    targets: Sequence[Target]
    base_name: bool = False

    def header(self) -> str:
        cells = [f"{'case':{self.width}}", *(f"{name:>8}" for name in ("floor", "base", "ours", "chain"))]
        cells += [f"{'ratio':>6} {'p10-p90':>11} {'chain':>6}"]
        cells += [f"{name.replace('sglang', 'sgl').replace('gathered_', ''):>9}" for name in self.beside]
        return " ".join([*cells, f"{'best':>5} {'floor%':>6}", *(["base"] if self.base_name else [])])

    def line(self, row: Row) -> str:
        """One row of the table."""
        name = f"{row['name']:{self.width}}"
        if row["status"] != "ok":
            return f"{name} {row['status'].upper()}: {row['reason']}"
        if "host_us" in row:
            return f"{name} host {row['host_us']:.1f} us a call (plain torch {row['base_host_us']:.1f})"
        us = row["us"]
        if "ratio" not in row:
            return f"{name} {us['ours']['chain']['median']:.2f} us"
        plain, chain = row["ratio"]["plain"], row["ratio"]["chain"]
        times = [row["floor_us"], us["base"]["plain"]["median"], us["ours"]["plain"]["median"]]
        cells = [name, *(number(value) for value in [*times, us["ours"]["chain"]["median"]])]
        cells.append(f"{plain['median']:6.3f} {plain['p10']:5.3f}-{plain['p90']:5.3f} {chain['median']:6.3f}")
        for other in self.beside:
            form = "eager" if other == EAGER else "plain"
            cells.append(number(us[other][form]["median"] if other in us else None, 9))
        best = row.get("best_peer")
        cells.append(f"{best['plain']['ratio']:5.2f}" if best else f"{'-':>5}")
        cells.append(f"{100 * row['floor_share']['plain']:6.0f}")
        return " ".join([*cells, *([row["base_name"]] if self.base_name else [])])

    def verdict_line(self, verdict: Verdict, chain: Verdict) -> str:
        """One target on one case; the value of the chain form in brackets."""
        if verdict.value is None:
            return f"  -       {verdict.name:{self.width}} not measured"
        unit = "us of host" if verdict.target.against == "host" else f"x {verdict.target.against}"
        beside = "" if chain.value in (None, verdict.value) else f" (chain {chain.value:.3f})"
        return (
            f"  {'met   ' if verdict.met else 'MISSED'}  {verdict.name:{self.width}} {verdict.value:.3f} {unit}, "
            f"at most {verdict.target.limit:.2f}{beside}"
        )

    def target_lines(self, rows: Sequence[Row]) -> list[str]:
        """Every target that a row was measured for; of the many against peers only the missed ones."""
        verdicts = list(zip(judge(rows, "plain", self.targets), judge(rows, "chain", self.targets), strict=True))
        measured = [pair for pair in verdicts if pair[0].value is not None]
        shown = [pair for pair in verdicts if pair[0].target.against != "peers"]
        against_peers = [pair for pair in measured if pair[0].target.against == "peers"]
        shown += [pair for pair in against_peers if not pair[0].met]
        met = sum(plain.met for plain, _ in measured)
        lines = [f"targets: {met} of {len(measured)} met", *(self.verdict_line(*pair) for pair in shown)]
        if against_peers:
            faster = sum(plain.met for plain, _ in against_peers)
            lines.append(f"  faster than every peer in {faster} of {len(against_peers)} cases")
        idle = [target.pattern for target in self.targets if not any(target.matches(row["name"]) for row in rows)]
        return [*lines, *(f"  not run: {pattern}" for pattern in idle if len(pattern) < 100)]


REPORT = Report(
    width=28,
    legend=(
        "us, medians, behind a tiny kernel whose own time is taken off (plain); chain: back to back; ratio: ours/base, "
        "round by round, with p10-p90; best: fastest peer/ours, plain; floor%: floor/ours, plain; peft: eager, host "
        "time"
    ),
    beside=PEERS,
    targets=TARGETS,
)


def missing_lines(rows: Iterable[Row]) -> list[str]:
    """Each reason for which a peer has no number, and in how many cases."""
    reasons = Counter((peer, why) for row in rows for peer, why in row.get("missing", {}).items())
    return [f"  {peer}: n/a in {count} cases: {why}" for (peer, why), count in sorted(reasons.items())]


def failed(rows: Iterable[Row], report: Report = REPORT) -> list[str]:
    """The lines of red and broken rows."""
    return [report.line(row) for row in rows if row["status"] in ("red", "error")]
