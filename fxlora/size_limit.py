"""Ends a capture whose sizes have become formulas that no one can compare any more.

Stage: capture, around a tracer that leaves every size open. Windows, shifts and paddings of images of open height and
width nest divisions and remainders, and whether two such sizes are equal takes sympy minutes to hours: a Swin of two
stages with two blocks each takes two minutes, with six blocks half an hour. Families that are captured in seconds stay
below 170 operations; those that are not pass 250 within the first blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

MOST_OPERATIONS = 200


class DeepSizeError(Exception):
    """A size, or a question about sizes, has more than MOST_OPERATIONS operations."""


@lru_cache(maxsize=4096)
def _operations(formula: Any) -> int:
    return int(formula.count_ops())


@contextmanager
def limited_sizes() -> Iterator[list[str]]:
    """Within it, a tracer fails (with an error of its own around ours) where a formula grows too long.

    Yields a list that holds the formula from then on. Whoever traces in another thread meanwhile is limited as well.
    """
    found: list[str] = []
    evaluate = ShapeEnv.evaluate_expr

    def limited(self: ShapeEnv, formula: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(formula, "count_ops") and _operations(formula) > MOST_OPERATIONS:
            found.append(str(formula))
            raise DeepSizeError(f"a size is a formula of {_operations(formula)} operations: {found[0][:200]}")
        return evaluate(self, formula, *args, **kwargs)

    # Torch notes who asks about a size, and skips its own frames up to there: what is asked is to stay the asker's.
    limited.__code__ = limited.__code__.replace(co_filename=evaluate.__code__.co_filename)
    ShapeEnv.evaluate_expr = limited  # type: ignore[method-assign]
    try:
        yield found
    finally:
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]
