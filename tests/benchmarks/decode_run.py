"""One measurement of the decode benchmark: the variants of one batch, built, checked, timed together.

A row is a dict, as the JSON holds it. Always: name, model, layers, kind (decode, prefill), size (requests of a decode
step, tokens of a prefill), variant, status (ok, red, error); reason unless ok. Else: requests, tokens, error (against
plain arithmetic), ms, host_us and, beside `base` in the same rounds, ratio, each a spread (median, p10, p90),
tokens_per_s, bytes (what the variant took on the device), seconds (until it was ready).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.decode_models import PRESETS, Bank, Context, decode_step, plain_lora, prefill_step, shared_copy
from tests.benchmarks.decode_timing import Timed, Turn, time_rounds
from tests.benchmarks.decode_variants import BUILDERS, Work
from tests.benchmarks.gpu_timing import ratios, spread
from tests.benchmarks.peers_adapter import reason

Row = dict[str, Any]
# Errors against plain arithmetic: at most this many times that of the untouched model, compiled against eager (which
# itself may be this many times the tolerance); and adapters must change the answer by so many times the error.
NOISE, EFFECT = 3.0, 5.0


@dataclass(frozen=True)
class Measurement:
    """kind: decode or prefill. size: requests of a decode step, or tokens of a prefill, `request_tokens` of each."""

    model: str
    layers: int
    kind: str
    size: int
    context: int = 1024
    request_tokens: int = 512
    rank: int = 16

    @property
    def requests(self) -> int:
        return self.size if self.kind == "decode" else max(1, self.size // self.request_tokens)

    def name(self, variant: str) -> str:
        return f"{self.model}-L{self.layers}-{self.kind}-{self.size}-{variant}"

    def row(self, variant: str, status: str, **facts: Any) -> Row:
        numbers = {"model": self.model, "layers": self.layers, "kind": self.kind, "size": self.size}
        return {"name": self.name(variant), **numbers, "variant": variant, "status": status, **facts}


def make_work(given: Measurement, model: Any, bank: Bank, compiler: Any, turn: Turn, peers: Any) -> Work:
    """The measurement, ready for its variants."""
    adapters = list(range(given.requests))
    if given.kind == "decode":
        context = Context(model, given.size, given.context)
        return Work(
            model, bank, adapters, given.size, lambda m: decode_step(m, context), (context.token, context.position),
            context.rewind, graphed=True, dynamic=False, compiler=compiler, turn=turn, peers=peers,
        )  # fmt: skip
    generator = torch.Generator(next(model.parameters()).device).manual_seed(2)
    length = given.size // given.requests
    ids = torch.randint(
        0, model.config.vocab_size, (given.requests, length), device=generator.device, generator=generator
    )
    return Work(
        model, bank, adapters, given.size, prefill_step, (ids,), lambda: None, graphed=False, dynamic=False,
        compiler=compiler, turn=turn, peers=peers, calls=4,
    )  # fmt: skip


@dataclass
class Truth:
    """Logits by plain arithmetic, eager: of each request with its adapter, of all with the first, of none."""

    mixed: torch.Tensor
    first: torch.Tensor
    bare: torch.Tensor

    @classmethod
    def of(cls, work: Work) -> Truth:
        model = shared_copy(work.model)
        step = work.step_of(model)

        def run(adapters: Sequence[int] | None) -> torch.Tensor:
            work.before()
            if adapters is None:
                return step(*work.inputs).float()
            with plain_lora(model, work.bank, adapters):
                return step(*work.inputs).float()

        return cls(run(work.adapters), run([0] * len(work.adapters)), run(None))

    def of_variant(self, variant: str) -> torch.Tensor:
        return {"base": self.bare, "ours_none": self.bare, "merged": self.first}.get(variant, self.mixed)


def row_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative Frobenius error of each request."""
    got, want = got.float().flatten(1), want.float().flatten(1)
    return (got - want).norm(dim=1) / want.norm(dim=1)


def judge(variant: str, got: torch.Tensor, truth: Truth, noise: float, share: float = 1.0) -> tuple[float, str]:
    """(worst error of a request, what is wrong or empty). noise: error that counts as none. share: of the requests, the
    best ones, that are looked at."""
    want = truth.of_variant(variant)
    errors = row_errors(got, want)
    error = float(errors.sort().values[: max(1, round(share * len(errors)))].max())
    if not bool(torch.isfinite(got).all()):
        return error, "logits are not finite"
    if error > noise:
        return error, f"relative error {error:.1e}, at most {noise:.1e}"
    if want is not truth.bare:
        effect = float(row_errors(truth.bare, want).min())
        if effect < EFFECT * error:
            return error, f"adapters change the logits by {effect:.1e} only, the error is {error:.1e}"
    return error, ""


@torch.no_grad()
def run_measurement(
    given: Measurement, work: Work, variants: Sequence[str], rounds: int, report: Any = lambda row: None,
    last_build: float | None = None,
) -> list[Row]:  # fmt: skip
    """Build, check and time the variants of one measurement; what fails is a row, and the others go on.

    last_build: of time.monotonic; variants not begun by then are left out, so that the others still get their times.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Timed] = {}
    truth = Truth.of(work)
    noise = PRESETS[given.model].tolerance
    for builder in ["base", *(v for v in variants if v != "base")]:
        before, begin = _allocated(), time.monotonic()
        if last_build is not None and rows and begin > last_build:
            report(f"{given.name(builder)}: out of time")
            continue
        try:
            built = BUILDERS[builder](work)
            for name, timed in built.items():
                limit = NOISE * noise if builder == "base" else noise
                error, wrong = judge(name, timed.once(), truth, limit, PRESETS[given.model].share)
                if builder == "base":
                    noise = max(noise, NOISE * error)
                facts = {"error": error, "seconds": time.monotonic() - begin, "bytes": _allocated() - before}
                rows[name] = given.row(name, "red" if wrong else "ok", **facts, **timed.facts)
                if wrong:
                    rows[name]["reason"] = wrong
                else:
                    steps[name] = timed
        except Exception as error:
            rows[builder] = given.row(builder, "error", reason=reason(error), seconds=time.monotonic() - begin)
            _collect()
        report(f"{given.name(builder)}: {rows[builder]['status']} {rows[builder].get('reason', '')}")
    slow = {name: timed for name, timed in steps.items() if name == "peft"}
    fast = {name: timed for name, timed in steps.items() if name not in slow}
    times = time_rounds(fast, rounds) | time_rounds(slow, min(rounds, 3))
    for name in steps:
        rows[name] |= summarise(given, times, name)
    return list(rows.values())


def summarise(given: Measurement, times: Mapping[str, Mapping[str, list[float]]], name: str) -> Row:
    """The numbers of one variant out of the rounds of all."""
    mine = times[name]["ms"]
    tokens = given.requests if given.kind == "decode" else given.size
    ms = spread(mine)
    row: Row = {
        "requests": given.requests,
        "tokens": tokens,
        "ms": ms,
        "host_us": spread(times[name]["host_us"]),
        "tokens_per_s": tokens / ms["median"] * 1e3,
        "rounds": len(mine),
    }
    if "base" in times:
        base = times["base"]["ms"]
        same = len(base) == len(mine)
        row["ratio"] = ratios(mine, base) if same else spread([m / spread(base)["median"] for m in mine])
    return row


def _allocated() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release(work: Work) -> None:
    """Free what the variants of a measurement held, compiled code with it."""
    work.close()
    torch._dynamo.reset()
    _collect()
