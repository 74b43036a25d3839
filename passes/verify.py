"""After the rewrite, structural checks: signature kept, every use replaced once, by its own member of its group's op;
nothing reads what was replaced, and what read it reads the replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fxlora.passes.errors import VerifyError
from fxlora.passes.graph import op_name, operand
from fxlora.passes.normalize import count_weight_nodes
from fxlora.passes.plan import Group, Plan, PlannedUse
from fxlora.passes.sites import Role, Site
from fxlora.passes.weights import Weights, tensor_key

_SITE_OPS = {
    Role.LINEAR: "fxlora::lora_linear",
    Role.LOGITS: "fxlora::lora_logits",
    Role.EXPERTS: "fxlora::lora_experts",
}
_EMBEDDING = "fxlora::lora_embedding"


def verify_rewrite(
    gm: fx.GraphModule,
    plan: Plan,
    results: Mapping[fx.Node, fx.Node],
    weights: Weights,
    handles: Mapping[tuple[Site, ...], int],
    signature: Sequence[str],
) -> None:
    """Raise :class:`VerifyError` when the rewritten graph breaks one of the rules above.

    results: what stands in the place of each planned call. signature: names of the inputs, in order.
    """
    gm.graph.lint()
    nodes = list(gm.graph.nodes)
    present = set(nodes)
    names = [n.target for n in nodes if n.op == "placeholder"]
    if names != [*signature]:
        raise VerifyError(f"the signature changed: expected {[*signature]}, found {names}")
    ops = [n for n in nodes if op_name(n) in (*_SITE_OPS.values(), _EMBEDDING)]
    if len(ops) != len(plan.groups):
        raise VerifyError(f"{len(plan.groups)} ops were planned, {len(ops)} fxlora ops stand in the graph")
    _check_uses(plan, present)
    for node in nodes:
        missing = [n.name for n in node.all_input_nodes if n not in present]
        if missing:
            raise VerifyError(f"{node.name} reads {missing}, which are not in the graph")
    for op, group in zip(ops, plan.groups, strict=True):
        _check_group(op, group, weights, handles)
        for i, use in enumerate(group.uses):
            _check_result(op, i, use, results, present)
    doubled = [count for count in count_weight_nodes(gm).values() if count > 1]
    if doubled:
        raise VerifyError(f"{len(doubled)} weights are read through more than one node")


def _check_uses(plan: Plan, present: set[fx.Node]) -> None:
    """Every use is a member of one group, and none of the replaced calls is left."""
    grouped = [use.node for group in plan.groups for use in group.uses]
    if len(grouped) != len(set(grouped)) or set(grouped) != {use.node for use in plan.uses}:
        raise VerifyError(f"the groups do not hold each of the {len(plan.uses)} planned uses once")
    stale = [use.node.name for use in plan.uses if use.node in present]
    if stale:
        raise VerifyError(f"replaced calls still stand in the graph: {stale[:5]}")


def _check_group(op: fx.Node, group: Group, weights: Weights, handles: Mapping[tuple[Site, ...], int]) -> None:
    """The op of a group reads the members' weights, in order, and the handle of just these sites."""
    role = group.uses[0].site.role
    if op_name(op) != _SITE_OPS.get(role, _EMBEDDING):
        raise VerifyError(f"{op.name} stands where {role.value} was planned")
    operands = op.args[1] if role is Role.LINEAR else [op.args[1]]
    read = [weights.root(operand)[0] for operand in operands]  # type: ignore[union-attr]
    found = [None if root is None else weights.tensor_of(root) for root in read]
    planned = [use.site.weight for use in group.uses]
    keys = [None if tensor is None else tensor_key(tensor) for tensor in found]
    if keys != [tensor_key(tensor) for tensor in planned]:
        raise VerifyError(f"{op.name} does not read the weights of {[site.name for site in group.sites]}, in order")
    if role is Role.EXPERTS:
        _check_table(op, group)
    if op.args[-1] != handles[group.sites]:
        raise VerifyError(f"{op.name} does not have the handle of {[site.name for site in group.sites]}")


def _check_table(op: fx.Node, group: Group) -> None:
    """The table of an expert op is that of its own rows and of its weight's experts."""
    table, experts = op.args[5], group.uses[0].site.num_experts
    made = isinstance(table, fx.Node) and op_name(table) == "fxlora::segment_experts"
    args = table.args if made else (None,) * 4  # type: ignore[union-attr]
    if args[0] is not op.args[3] or args[3] != experts or (args[1] is None) == (args[2] is None):
        raise VerifyError(f"{op.name} does not read the table of its own rows over {experts} experts")


def _check_result(
    op: fx.Node, index: int, use: PlannedUse, results: Mapping[fx.Node, fx.Node], present: set[fx.Node]
) -> None:
    """Whatever read the call now reads this member's result, behind a reorder of dims or an addition at most (of an
    expert op, whose rows are flat, a reshape too).
    """
    result = pick = results.get(use.node)
    between = ("permute", "add", "reshape", "unsqueeze") if use.site.role is Role.EXPERTS else ("permute", "add")
    while isinstance(pick, fx.Node) and pick is not op and op_name(pick) in between:
        pick = operand(pick)
    if use.site.role is Role.LINEAR and pick is not None and op_name(pick) == "getitem" and pick.args[1] == index:
        pick = operand(pick)
    elif use.site.role is Role.LINEAR:
        pick = None
    if result is None or pick is not op:
        raise VerifyError(f"the result of {use.node.name} is not member {index} of {op.name}")
    lost = [reader.name for reader in use.readers if reader in present and result not in reader.all_input_nodes]
    if lost or (use.readers and not result.users):
        raise VerifyError(f"{op.name} is not read by what read {use.node.name}: {lost[:5]}")
