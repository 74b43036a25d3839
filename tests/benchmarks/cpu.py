"""SmolLM2-135M on the CPU: the untouched model, its captured graph, fxlora and PEFT's mixed batch side by side.

`python -m tests.benchmarks.cpu [--rounds 20] [--json FILE]`. Eight requests over four adapters (ranks 8 and 16, on
every linear and on lm_head, B not zero) and rows without one; prefill of 128 tokens and one decode step on a cache of
128. Everything runs in fp32. The answers are compared first; where they differ nothing is timed and nothing printed.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fxlora
from fxlora.commands.app import quieten
from fxlora.demo.smollm2 import load_smollm2

RANKS = {"one": 8, "two": 16, "three": 8, "four": 16}
REQUESTS = ("one", "two", None, "three", "four", "one", None, "two")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
LENGTH = 128
TOLERANCE = 1e-4
TARGET_RATIO = {"prefill": 1.10, "decode": 1.35}
UNTOUCHED, GRAPH, FXLORA, PEFT = "untouched", "captured graph", "fxlora", "PEFT"
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """One regime. Seconds and ratios by model: medians over the rounds, ratios taken within each round.

    target: what fxlora over the untouched model may be at most. max_error: largest difference between fxlora's logits
    and PEFT's, over the largest logit.
    """

    regime: str
    seconds: dict[str, float]
    over_untouched: dict[str, float]
    fxlora_over_peft: float
    target: float
    max_error: float


@dataclass(frozen=True)
class Memory:
    """Bytes of the process. peaks are resident high-water marks of one prefill, the weights included."""

    base_weight_bytes: int
    adapter_pool_bytes: int
    untouched_peak_bytes: int
    fxlora_peak_bytes: int


class DecodeStep(torch.nn.Module):
    """One decode step with the cache as plain tensors; its modules keep the paths they have in the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        """input_ids int64 [B, 1]; cache: keys and values of each layer in turn, fp32 [B, heads, length, head_dim]."""
        hidden = self.model(input_ids=input_ids, past_key_values=cache_of(cache), use_cache=True).last_hidden_state
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


def cache_of(tensors: Sequence[torch.Tensor]) -> Any:
    """Return a transformers cache over keys and values of each layer in turn; the tensors are never written to."""
    from transformers import DynamicCache

    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def share_weights(model: Any) -> Any:
    """Return a copy of the modules over the same tensors, so that PEFT can wrap it and leave the original alone."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_adapters(model: Any, folder: Path) -> dict[str, Path]:
    """Save one PEFT adapter per name in `RANKS`, all tensors drawn at random, and return their folders."""
    from peft import LoraConfig, get_peft_model

    folders: dict[str, Path] = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        tuned = get_peft_model(share_weights(model), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.01)
        folders[name] = folder / name
        tuned.save_pretrained(folders[name], save_embedding_layers=False)
    return folders


def load_peft(model: Any, folders: dict[str, Path]) -> Any:
    """Return PEFT's model with every adapter loaded in fp32, over the weights of `model`."""
    from peft import PeftModel

    first, *others = folders
    tuned = PeftModel.from_pretrained(share_weights(model), str(folders[first]), adapter_name=first)
    for name in others:
        tuned.load_adapter(str(folders[name]), adapter_name=name)
    return tuned.float().eval()


def load_fxlora(graph: torch.fx.GraphModule, folders: dict[str, Path]) -> Any:
    """Return the rewritten graph with every adapter loaded."""
    lora = fxlora.apply(graph, max_adapters=len(RANKS), max_rank=max(RANKS.values()))
    for name, folder in folders.items():
        lora.load_adapter(name, str(folder))
    return lora


def peak_bytes(step: Step) -> int:
    """Return the high-water mark of resident memory while `step` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory rather than return it, for all models alike.

    Otherwise whichever step frees last decides who pays for fresh pages: 5 to 30 ms of a 100 ms decode step.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    for parameter in (trim_threshold, mmap_threshold):
        libc.mallopt(parameter, 1 << 30)


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Run every step once per round, in an order that turns from round to round, and return seconds by name."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def check(steps: dict[str, Step]) -> float:
    """Return the largest error against PEFT over the largest logit; exits where it, or a bare row, is wrong."""
    ours, peft, untouched = steps[FXLORA](), steps[PEFT](), steps[UNTOUCHED]()
    bare = [row for row, name in enumerate(REQUESTS) if name is None]
    error = ((ours - peft).abs().max() / peft.abs().max()).item()
    bare_error = ((ours[bare] - untouched[bare]).abs().max() / untouched.abs().max()).item()
    moved = ((peft - untouched).abs().amax(dim=(1, 2)) / untouched.abs().max())[[row not in bare for row in range(8)]]
    if max(error, bare_error) > TOLERANCE or moved.min().item() < 100 * TOLERANCE:
        sys.exit(f"wrong answers: {error:.1e} against PEFT, {bare_error:.1e} on bare rows; nothing was timed")
    return error


def time_regime(regime: str, steps: dict[str, Step], rounds: int) -> Timing:
    """Check, time and summarise one regime."""
    error = check(steps)
    seconds = time_rounds(steps, rounds)

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    return Timing(
        regime=regime,
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        over_untouched={name: ratio(name, UNTOUCHED) for name in steps},
        fxlora_over_peft=ratio(FXLORA, PEFT),
        target=TARGET_RATIO[regime],
        max_error=error,
    )


@torch.no_grad()
def run(rounds: int) -> tuple[list[Timing], Memory]:
    """Build the three models over one set of weights and measure both regimes."""
    quieten()
    model, _ = load_smollm2()
    names = ["__base__" if name is None else name for name in REQUESTS]
    ids = torch.randint(0, model.config.vocab_size, (len(REQUESTS), LENGTH), generator=torch.Generator().manual_seed(0))
    past = model(input_ids=ids, use_cache=True).past_key_values
    cache = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    token = ids[:, :1]
    untouched_peak = peak_bytes(lambda: model(input_ids=ids).logits)

    with tempfile.TemporaryDirectory() as folder:
        with torch.enable_grad():
            folders = make_adapters(model, Path(folder))
        prefill = load_fxlora(fxlora.capture(model, input_ids=ids), folders)
        memory = Memory(
            base_weight_bytes=sum(tensor.nbytes for tensor in model.parameters()),
            adapter_pool_bytes=prefill.pool.bytes,
            untouched_peak_bytes=untouched_peak,
            fxlora_peak_bytes=peak_bytes(lambda: prefill(input_ids=ids, adapters=list(REQUESTS)).logits),
        )
        decode = load_fxlora(fxlora.capture(DecodeStep(model), input_ids=token, cache=cache), folders)
        peft = load_peft(model, folders)
    keep_freed_memory()
    timings = [
        time_regime(
            "prefill",
            {
                UNTOUCHED: lambda: model(input_ids=ids).logits,
                GRAPH: lambda: prefill.base(input_ids=ids).logits,
                FXLORA: lambda: prefill(input_ids=ids, adapters=list(REQUESTS)).logits,
                PEFT: lambda: peft(input_ids=ids, adapter_names=names).logits,
            },
            rounds,
        ),
        time_regime(
            "decode",
            {
                UNTOUCHED: lambda: model(input_ids=token, past_key_values=cache_of(cache), use_cache=True).logits,
                GRAPH: lambda: decode.base(input_ids=token, cache=cache),
                FXLORA: lambda: decode(input_ids=token, cache=cache, adapters=list(REQUESTS)),
                PEFT: lambda: (
                    peft(input_ids=token, past_key_values=cache_of(cache), use_cache=True, adapter_names=names).logits
                ),
            },
            rounds,
        ),
    ]
    return timings, memory


def show(timings: list[Timing], memory: Memory) -> None:
    """Print the table of times, the targets, and the memory."""
    console = Console(highlight=False)
    table = Table(
        title="SmolLM2-135M, fp32: 8 requests over 4 adapters and bare rows",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model")
    for timing in timings:
        table.add_column(timing.regime, justify="right")
        table.add_column("x untouched", justify="right")
    for name in timings[0].seconds:
        cells = [(f"{row.seconds[name] * 1e3:.1f} ms", f"{row.over_untouched[name]:.3f}") for row in timings]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    console.print(table)
    for row in timings:
        console.print(
            f"  {row.regime}: target {row.target:.2f} x untouched, fxlora has {row.over_untouched[FXLORA]:.3f}; "
            f"{row.fxlora_over_peft:.3f} x PEFT; equal to PEFT within {row.max_error:.1e}"
        )
    console.print(
        f"  memory: weights {_mib(memory.base_weight_bytes)}, adapter pools {_mib(memory.adapter_pool_bytes)}; prefill "
        f"peaks at {_mib(memory.untouched_peak_bytes)} untouched, {_mib(memory.fxlora_peak_bytes)} with fxlora"
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def main() -> None:
    """Parse the arguments, run, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/cpu.json"))
    arguments = parser.parse_args()
    timings, memory = run(arguments.rounds)
    show(timings, memory)
    record = {
        "timings": [asdict(timing) for timing in timings],
        "memory": asdict(memory),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("fxlora", "torch", "transformers", "peft")},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
