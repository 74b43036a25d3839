"""`fxlora env`: the versions and the device that a bug report needs."""

from __future__ import annotations

import platform
from importlib import metadata

from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("fxlora", "torch", "triton", "transformers", "peft", "safetensors", "networkx")


def environment() -> dict[str, str]:
    """Return name to version of everything that matters, "not installed" where it is not."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **_devices()}


def _devices() -> dict[str, str]:
    """The build of torch, which its package's version does not name, and what it sees."""
    import torch

    found = {"torch": str(torch.__version__), "CPU threads": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        return {**found, "CUDA": f"none (torch built for {torch.version.cuda or 'the CPU alone'})"}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {**found, "CUDA": str(torch.version.cuda), "GPU": ", ".join(names)}


def show_environment(console: Console) -> None:
    """Print the environment as a table of two columns."""
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in environment().items():
        table.add_row(name, value)
    console.print(table)
