"""`fxlora demo`: prepare a case, serve it, print the report."""

from __future__ import annotations

import time
from typing import Literal

from rich.console import Console

from fxlora.demo import cache_folder
from fxlora.demo.case import tiny_case
from fxlora.demo.serve import serve
from fxlora.demo.show import show

Model = Literal["tiny", "smollm2"]


def run_demo(model: Model, console: Console) -> bool:
    """Run one demo and print it. Returns whether everything it claims held."""
    started = time.perf_counter()

    def report(line: str) -> None:
        console.print(f"  {line} ...", style="dim", highlight=False)

    if model == "smollm2":
        from fxlora.demo.smollm2 import smollm2_case

        case = smollm2_case(report)
    else:
        case = tiny_case()
    names = ", ".join(case.adapters)
    console.print(
        f"Serving {case.title} with the adapters {names}, and bare, in one batch of one graph.", highlight=False
    )
    served = serve(case, report, graph_report=cache_folder() / f"demo-{model}.html")
    console.print()
    show(console, served)
    console.print(f"  {time.perf_counter() - started:.0f} s in all.", style="dim", highlight=False)
    return served.holds
