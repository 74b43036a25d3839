"""Refusals of the command line and the demo: something they need is not there."""

from __future__ import annotations

from fxlora.errors import FxloraError


class MissingPackageError(FxloraError):
    """A package that one command needs is missing; the message says how to install it."""

    def __init__(self, needed_for: str, packages: list[str], command: str) -> None:
        super().__init__(f"{needed_for} needs {', '.join(packages)}; install with: {command}")


class NoCloneError(FxloraError):
    """A command needs the repository and was called outside of a clone."""


class UnknownModelError(FxloraError):
    """The folder holds no model that transformers can build, or one that no example input is known for."""
