"""The `fxlora` command: sees to its packages and to idle threads, then hands over to `fxlora.commands`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

CLI_PACKAGES = ("typer", "rich", "tqdm")
IDLE_THREADS = "OMP_WAIT_POLICY"


def main() -> None:
    """Run the command line; without the packages of the extra `cli`, say how to get them and exit with 2."""
    missing = [package for package in CLI_PACKAGES if find_spec(package) is None]
    if missing:
        sys.stderr.write(f"fxlora: the command line needs {', '.join(missing)}; pip install 'fxlora[cli]'\n")
        raise SystemExit(2)
    let_idle_threads_sleep()
    from fxlora.commands.app import app

    app()


def let_idle_threads_sleep() -> None:
    """Start this process again with idle OpenMP threads asleep, unless the caller chose how they wait.

    OpenMP reads the choice when torch is first imported, which has happened by now. On two cores, threads that spin
    cost a factor of 20.
    """
    if IDLE_THREADS not in os.environ and os.name == "posix":
        os.environ[IDLE_THREADS] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
