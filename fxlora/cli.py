"""The `fxlora` command: checks that the packages of the extra `cli` are there, then hands over to `fxlora.commands`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

CLI_PACKAGES = ("typer", "rich", "tqdm")


def main() -> None:
    """Run the command line; without the packages of the extra `cli`, say how to get them and exit with 2."""
    missing = [package for package in CLI_PACKAGES if find_spec(package) is None]
    if missing:
        sys.stderr.write(f"fxlora: the command line needs {', '.join(missing)}; pip install 'fxlora[cli]'\n")
        raise SystemExit(2)
    from fxlora.commands.app import app

    app()


if __name__ == "__main__":
    main()
