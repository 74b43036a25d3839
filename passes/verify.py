"""After the rewrite, structural checks: signature kept, every use replaced, no op left unfed, nothing reads what was
replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxlora.passes.errors import VerifyError
from fxlora.passes.graph import op_name
from fxlora.passes.normalize import count_weight_nodes
from fxlora.passes.plan import Plan

_SITE_OPS = {"fxlora::lora_linear", "fxlora::lora_logits", "fxlora::lora_embedding"}


def verify_rewrite(gm: fx.GraphModule, plan: Plan, placeholders: Iterable[str], slots_name: str) -> None:
    """Raise :class:`VerifyError` when the rewritten graph breaks one of the rules above."""
    gm.graph.lint()
    nodes = list(gm.graph.nodes)
    present = set(nodes)
    names = [n.target for n in nodes if n.op == "placeholder"]
    if names != [*placeholders, slots_name]:
        raise VerifyError(f"the signature changed: expected {[*placeholders, slots_name]}, found {names}")
    ops = [n for n in nodes if op_name(n) in _SITE_OPS]
    if len(ops) != len(plan.uses):
        raise VerifyError(f"{len(plan.uses)} uses were planned, {len(ops)} fxlora ops stand in the graph")
    stale = [use.node.name for use in plan.uses if use.node in present]
    if stale:
        raise VerifyError(f"replaced calls still stand in the graph: {stale[:5]}")
    for node in nodes:
        missing = [n.name for n in node.all_input_nodes if n not in present]
        if missing:
            raise VerifyError(f"{node.name} reads {missing}, which are not in the graph")
    unread = sum(not _is_read(n) for n in ops) - sum(not use.read for use in plan.uses)
    if unread > 0:
        raise VerifyError(f"{unread} fxlora ops are read by nothing, though the calls they replaced were")
    doubled = [count for count in count_weight_nodes(gm).values() if count > 1]
    if doubled:
        raise VerifyError(f"{len(doubled)} weights are read through more than one node")


def _is_read(op: fx.Node) -> bool:
    """Does anything read the result? That of lora_linear is read through a pick of each member."""
    return any(user.users or op_name(user) != "getitem" for user in op.users)
