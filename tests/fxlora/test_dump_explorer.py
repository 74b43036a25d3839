"""A `.me.json` in the real Model Explorer: its server takes the file, its page shows both graphs and their modules."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxlora
from tests.fxlora.dump_cases import page, shared

pytest.importorskip("model_explorer", reason="ai-edge-model-explorer is not installed")


@contextlib.contextmanager
def serving(file: Path) -> Iterator[str]:
    """The address of Model Explorer over a file."""
    program = shutil.which("model-explorer", path=str(Path(sys.executable).parent))
    assert program is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--no_open_in_browser", "--skip_health_check", "--port", str(port))
    server = subprocess.Popen([program, str(file), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
        models = urllib.parse.quote(json.dumps({"models": [{"url": str(file)}]}))
        yield f"http://localhost:{port}/?data={models}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_model_explorer_shows_both_graphs(tmp_path: Path) -> None:
    lora = shared()
    file = fxlora.dump(lora, tmp_path / "g.me.json")
    nodes = {"before": len(lora.record.before.nodes), "after": len(lora.record.graph.nodes)}
    flags = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # it draws with WebGL
    with page(flags=flags, offline=False) as made, serving(file) as address:
        made.route("**/*", lambda r: r.continue_() if "localhost" in r.request.url else r.abort())  # fonts of a CDN
        made.goto(address)
        made.wait_for_selector(f"text={nodes['after']} nodes", timeout=60_000)
        text = made.inner_text("body")
        assert "Shared" in text
        assert "after" in text
        made.wait_for_selector("text=layer count", timeout=60_000)
        assert [p for p in made.problems if "ERR_FAILED" not in p and "ERR_NAME" not in p] == []
        made.locator(f"text={nodes['after']} nodes").first.click()
        made.wait_for_selector(f"text={nodes['before']} nodes", timeout=20_000)
