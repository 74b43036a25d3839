"""Which nodes of the two sides of a rewrite stand for each other."""

from __future__ import annotations

from fxlora.dumps.graph import is_site_op
from fxlora.dumps.record import Record
from fxlora.passes.diff import NodeState
from fxlora.passes.graph import operand


def became(record: Record) -> dict[str, list[str]]:
    """Each rewritten call of the graph before, by name: what stands in its place, then the op that makes it."""
    if record.after is None:
        return {}
    states = {state.node: state for state in record.after.nodes}
    found: dict[str, list[str]] = {}
    for use in record.uses:
        node: NodeState | None = states.get(record.results[use.node]) if use.node in record.results else None
        chain: list[str] = []
        while node is not None:
            chain.append(node.name)
            node = None if is_site_op(node) else states.get(operand(node))  # type: ignore[arg-type]
        found[use.node.name] = list(dict.fromkeys([*chain[:1], *chain[-1:]]))
    return found


def came_from(record: Record) -> dict[str, list[str]]:
    """Each node of the rewritten graph that serves a call of the graph before: the calls it stands for."""
    found: dict[str, list[str]] = {}
    for call, made in became(record).items():
        for node in made:
            found.setdefault(node, []).append(call)
    return found
