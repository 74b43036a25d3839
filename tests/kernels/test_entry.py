"""The ways into a compiled kernel hand the driver the same, whichever Triton is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fxlora.kernels import entry, launch, replay

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("gcc") or shutil.which("cc")
HOPPER = {"fused_hopper_kernel", "prefill_hopper_kernel", "prefill_hopper_shrink_kernel", "expert_hopper_kernel"}


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, as Triton's launcher does")
def test_prepared_calls_and_replays_give_the_driver_what_triton_gives_it(tmp_path: Path) -> None:
    """Grid, block, shared memory, stream and every byte of every parameter, maps of tensors included."""
    driver = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("no_driver.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(driver), str(source)], check=True)
    (tmp_path / "libcuda.so").symlink_to(driver.name)
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.entered"]
    done = subprocess.run(command, cwd=ROOT, env={**plain, **paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel for call in found for kernel in call["kernels"]} >= HOPPER
    assert sum(call["maps"] for call in found) > 20
    assert [call["call"] for call in found if call["same"] != [True] * 4] == []
    # the one that compiles, the plain one, and one more before it is known
    assert {call["prepared"] for call in found} == {3}


def compiled(triton_launch: Any) -> Any:
    run = SimpleNamespace(
        launch=triton_launch, global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False,
        launch_pdl=True, arg_annotations="annotated", kernel_signature="signature",
    )  # fmt: skip
    return SimpleNamespace(run=run, function=7, packed_metadata="packed")


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0"])
def test_a_launcher_that_is_not_known_is_entered_as_triton_does(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C function is what it is without a closure, a `launcher` in one that is known, else nothing."""
    monkeypatch.setattr(entry.triton, "__version__", version)
    entry.release.cache_clear()
    launcher, unknown = len, len

    def of_another_triton(*args: object) -> object:
        return unknown(args)

    def without_maps(*args: object) -> object:
        return launcher(args)

    natives = [entry.entry(compiled(found), 2).native for found in (len, of_another_triton, without_maps)]
    assert [native is None for native in natives] == [version == "3.10.0", True, True]
    entry.release.cache_clear()


def test_addresses_kept_of_a_tensor_that_tma_moves_are_few() -> None:
    made: list[int] = []

    def unfold(number: int, described: launch.Described) -> tuple[object, ...]:
        made.append(described.base.data_ptr())
        return number, described.base.data_ptr(), *described.shape, *described.strides

    native = entry.Native(print, (), (), False, unfold)
    maps = replay._Unfolded(native, 3, launch.Described(torch.zeros(4, 16), (4, 16)))
    assert maps[64] == maps[64] == (3, 64, 4, 16, 16, 1)
    assert made == [64]
    for address in range(0, 16 * 3 * replay.MOST_ADDRESSES, 16):
        assert maps[address][1] == address
        assert len(maps) <= replay.MOST_ADDRESSES
