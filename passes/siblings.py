"""Sibling linears: those that read one input become members of one op (q, k and v; gate and up; w1 and w3).

Stage: after the plan, before adapter memory is allocated (a group has one handle) and before the rewrite. Told by
dataflow alone, never by name: members read the same input with the same row map, and the op stands where the first of
them stood. A later member joins only if all that it reads is there already, or is a view or a cast that can be made
there, and nothing writes that memory in place between the two places.

The results of a group are kept together, so at most `_MAX_LATER` linears made from them may stand before a further
member (MLA's two down-projections, an MLP beside attention): the cross-attentions of a whole decoder, which all read
the encoder's output, stay apart.

A group is a list of uses, its handle a list of pools: one site may be in several groups (a gate called on two paths),
or in one twice (called twice on one input).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxlora.passes.graph import describe, op_name
from fxlora.passes.memory import Memory, may_write
from fxlora.passes.plan import Group, Plan, PlannedUse, digest_of
from fxlora.passes.reads import Read, Reader
from fxlora.passes.sites import Role, Site
from fxlora.passes.weights import PASS_ON

_REPEATABLE = PASS_ON | {"sym_size", "size", "shape"}


_MAX_LATER = 1
"""Linears made from a group's results that may stand before a further member: bounds how long results are kept."""


def group_siblings(plan: Plan, sites: Sequence[Site], graph: fx.Graph, reader: Reader) -> Plan:
    """The plan with its uses in as few groups as the rules allow, and the digest that goes with it.

    sites: all of the graph, targeted or not.
    """
    finder = _Finder(graph, reader, {use for site in sites for use in site.uses})
    for use in plan.uses:
        finder.add(use)
    groups = tuple(draft.group() for draft in finder.drafts)
    return replace(plan, groups=groups, digest=digest_of(plan.sites, plan.shape, groups))


class _Draft:
    """A group while it grows."""

    def __init__(self, use: PlannedUse, read: Read, reason: str) -> None:
        self.uses, self.read, self.reason = [use], read, reason
        self.moved: dict[fx.Node, None] = {}

    def group(self) -> Group:
        reason = self.reason
        if len(self.uses) > 1:
            reason = f"{len(self.uses)} linears read {self.read.x.name}" + (f"; {reason}" if reason else "")
        return Group(tuple(self.uses), reason, tuple(self.moved))


class _Finder:
    """Puts one use after the other, in graph order, into the first group that it may join."""

    def __init__(self, graph: fx.Graph, reader: Reader, linears: set[fx.Node]) -> None:
        self.reader, self.memory, self.linears = reader, Memory(graph, reader), linears
        self.drafts: list[_Draft] = []
        self._open: dict[Any, list[_Draft]] = {}
        self._numbers: dict[Any, int] = {}
        self._values: dict[fx.Node, int] = {}

    def add(self, use: PlannedUse) -> None:
        """Join or open a group; a group opened beside another over the same input says why."""
        read = self.reader.read_as(use.node, use.site.kind)
        if use.site.role is not Role.LINEAR:
            self.drafts.append(_Draft(use, read, f"the role {use.site.role.value} has ops of its own"))
            return
        beside = self._open.setdefault(self._value(read.x), [])
        reason = ""
        for draft in list(beside):
            if self._is_past(draft, use):
                beside.remove(draft)
                reason = f"apart from {draft.uses[0].site.name}: linears made from its result come first"
                continue
            moved, reason = self._joins(draft, use, read)
            if not reason:
                draft.uses.append(use)
                draft.moved |= dict.fromkeys(moved)
                return
            reason = f"apart from {draft.uses[0].site.name}: {reason}"
        draft = _Draft(use, read, reason)
        beside.append(draft)
        self.drafts.append(draft)

    def _joins(self, draft: _Draft, use: PlannedUse, read: Read) -> tuple[list[fx.Node], str]:
        """What must move to the group's place for a use to join it, or why it cannot."""
        first = draft.uses[0]
        if use.rows is not first.rows or read.x_order != draft.read.x_order:
            return [], "its rows follow another map"
        if (use.site.dtype, use.site.device) != (first.site.dtype, first.site.device):
            return [], f"its adapters are {use.site.dtype} on {use.site.device}"
        order, memory = self.memory.order, self.memory
        place, own = order[first.node], order[use.node]
        needed = self._trail(read.operand, place) + (self._trail(read.bias, place) if read.bias is not None else [])
        late = [node for node in needed if order[node] >= place]
        for node in late:
            if node.op != "get_attr" and not self._is_repeatable(node):
                return [], f"it needs {describe(node)}, which comes later"
        inputs = [] if read.x is draft.read.x else [n for x in (read.x, draft.read.x) for n in self._trail(x, -1)]
        since = min([place, *(order[node] for node in inputs if self._is_repeatable(node))])
        write = memory.write_between([read.x, *inputs], since, own) or memory.write_between(needed, place, own)
        return sorted(late, key=order.__getitem__), "" if write is None else f"{describe(write)} writes in between"

    def _is_past(self, draft: _Draft, use: PlannedUse) -> bool:
        """Do more linears that are made from a group's results come before a use than `_MAX_LATER`?"""
        order, ahead = self.memory.order, [member.node for member in draft.uses]
        seen, later = set(ahead), 0
        while ahead and later <= _MAX_LATER:
            for reader in ahead.pop().users:
                if order[reader] < order[use.node] and reader not in seen:
                    seen.add(reader)
                    ahead.append(reader)
                    later += reader in self.linears
        return later > _MAX_LATER

    def _trail(self, node: fx.Node, place: int) -> list[fx.Node]:
        """A value and the repeatable calls it is made by, up to what stands before a place or cannot be repeated."""
        found, ahead = [node], [node]
        while ahead:
            node = ahead.pop()
            if self.memory.order[node] >= place and self._is_repeatable(node):
                fresh = [n for n in node.all_input_nodes if n not in found]
                found += fresh
                ahead += fresh
        return found

    def _value(self, node: fx.Node) -> int:
        """One number for all nodes that are the same views and casts of the same value, writes left aside."""
        if node not in self._values:
            key: Any = node
            if self._is_repeatable(node):
                key = (node.op, node.target, self._shown(node.args), self._shown(node.kwargs))
            self._values[node] = self._numbers.setdefault(key, len(self._numbers))
        return self._values[node]

    def _shown(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("value", self._value(value))
        if isinstance(value, dict):
            return tuple((k, self._shown(v)) for k, v in sorted(value.items()))
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(self._shown(v) for v in value)
        return repr(value)

    @staticmethod
    def _is_repeatable(node: fx.Node) -> bool:
        """Made a second time, or at another place, it is the same value as long as nothing writes what it reads."""
        return node.op.startswith("call") and op_name(node) in _REPEATABLE and not may_write(node)
