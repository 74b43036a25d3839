"""Random straight-line programs around one or two target linears, built as fx graphs, with their truth by numerics.

A program grows value by value: each step picks an op that fits, runs it eagerly on the example (so that shapes and
aliasing are those of the real run) and writes the node. A careful program keeps every op off the dims that carry
requests, so a prover should accept it; a wild one uses any dim, any constant index and any matmul.
Shape letters: B requests, T tokens, H features.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from tests.toys.base import Adapter, Sizes, merged

Item = TypeVar("Item")


class Chooser(Protocol):
    """Where a program's decisions come from: a hypothesis draw or a seeded random.Random."""

    def pick(self, options: Sequence[Item]) -> Item: ...


@dataclass(frozen=True)
class Atom:
    """One original dim: its size, whether it carries requests, and the node of its size where it stays symbolic."""

    size: int
    request: bool = False
    node: fx.Node | None = None


Dim = tuple[Atom, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of the program: its node, its eager value, and which atoms each of its dims is made of."""

    node: fx.Node
    tensor: torch.Tensor
    dims: tuple[Dim, ...]

    def free(self, careful: bool, at_least: int = 1) -> list[int]:
        """The dims an op may work along."""
        return [
            index
            for index, dim in enumerate(self.dims)
            if self.tensor.shape[index] >= at_least and not (careful and any(atom.request for atom in dim))
        ]


class CannotStep(Exception):
    """The op does not fit the values at hand."""


class Program:
    """A graph under construction over one input x [B, T, H]; `finish` gives the GraphModule and its input."""

    def __init__(self, chooser: Chooser, sizes: Sizes, careful: bool, symbolic: bool, seed: int = 0) -> None:
        self.chooser, self.careful, self.symbolic = chooser, careful, symbolic
        self.sizes, self.generator = sizes, torch.Generator().manual_seed(seed)
        self.root, self.graph, self.sites, self.count, self.floor = nn.Module(), fx.Graph(), 0, 0, 0
        x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=self.generator)
        node = self.graph.placeholder("x")
        self.example = x.clone()
        atoms = [
            Atom(size, dim == 0, self.graph.call_method("size", (node, dim)) if symbolic else None)
            for dim, size in enumerate(x.shape)
        ]
        start = self.graph.call_function(torch.clone, (node,))
        self.values = [Value(start, x.clone(), tuple((atom,) for atom in atoms))]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def constant(self, tensor: torch.Tensor) -> tuple[fx.Node, torch.Tensor]:
        """A buffer of the module: its node and its value."""
        self.count += 1
        self.root.register_buffer(f"c{self.count}", tensor)
        return self.graph.get_attr(f"c{self.count}"), tensor

    def call(self, target: Callable[..., Any] | str, *arguments: Any, **options: Any) -> tuple[fx.Node, Any]:
        """Run an op eagerly and write its node; arguments are pairs (node, value), sizes or plain Python."""
        node_args, real_args = unzip(arguments)
        node_kwargs, real_kwargs = unzip(options)
        try:
            if isinstance(target, str):
                result = getattr(real_args[0], target)(*real_args[1:], **real_kwargs)
            else:
                result = target(*real_args, **real_kwargs)
        except (RuntimeError, IndexError) as error:
            raise CannotStep(str(error)) from error
        if isinstance(target, str):
            return self.graph.call_method(target, node_args, node_kwargs), result
        return self.graph.call_function(target, node_args, node_kwargs), result

    def keep(self, made: tuple[fx.Node, torch.Tensor], dims: Sequence[Dim]) -> Value:
        """Add a value to the pool; its dims must fit its shape."""
        node, tensor = made
        if tuple(math.prod(atom.size for atom in dim) for dim in dims) != tuple(tensor.shape):
            raise AssertionError(f"{node.target}: {tensor.shape} is not {dims}")
        value = Value(node, tensor, tuple(dims))
        self.values.append(value)
        return value

    def fresh(self, size: int) -> Dim:
        return (Atom(size),)

    def size_of(self, dim: Dim) -> Size:
        """The size of a dim as an argument of a view: an int, or the product of size nodes where it is symbolic."""
        size: int | fx.Node = 1
        for atom in dim:
            part = atom.node if atom.node is not None else atom.size
            if isinstance(size, int) and isinstance(part, int):
                size *= part
            else:
                size = part if size == 1 else self.graph.call_function(operator.mul, (size, part))
        return Size(size, math.prod(atom.size for atom in dim))

    def step(self, ops: Sequence[Callable[[Program, Value], None]]) -> None:
        """Apply one random op to one of the last values; an op that does not fit is left out.

        After the first site only values that depend on it are picked, so the answer depends on the adapter.
        """
        value = self.chooser.pick(self.values[self.floor :][-3:])
        before = len(self.graph.nodes)
        op = self.chooser.pick(ops)
        try:
            op(self, value)
        except CannotStep:
            for node in list(self.graph.nodes)[before:][::-1]:
                self.graph.erase_node(node)

    def site(self, value: Value) -> Value:
        """A target linear over the last dim, which is first brought to H by an untargeted weight where needed."""
        if value.tensor.dim() == 0 or len(value.dims) - 1 not in value.free(self.careful):
            raise CannotStep("the last dim carries requests")
        width = value.tensor.shape[-1]
        self.sites += 1
        name = f"proj{self.sites}"
        linear = nn.Linear(self.sizes.features, self.sizes.features + 2)
        with torch.no_grad():
            linear.weight.copy_(self.random(*linear.weight.shape) * self.sizes.features**-0.5)
            linear.bias.copy_(self.random(linear.out_features) * 0.1)
        self.root.add_module(name, linear.requires_grad_(False))
        weight, bias = self.graph.get_attr(f"{name}.weight"), self.graph.get_attr(f"{name}.bias")
        if width != self.sizes.features:
            fit = self.constant(self.random(self.sizes.features, width) * width**-0.5)
            value = self.keep(
                self.call(F.linear, pair(value), fit), (*value.dims[:-1], self.fresh(self.sizes.features))
            )
        made = self.call(F.linear, pair(value), (weight, linear.weight), (bias, linear.bias))
        self.floor = self.floor or len(self.values)
        return self.keep(made, (*value.dims[:-1], self.fresh(linear.out_features)))

    def finish(self, outputs: Sequence[Value]) -> fx.GraphModule:
        """The GraphModule; unused size nodes are left out."""
        self.graph.output(tuple(value.node for value in outputs) if len(outputs) > 1 else outputs[0].node)
        for node in list(self.graph.nodes)[::-1]:
            if node.target == "size" and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


@dataclass(frozen=True)
class Size:
    """A view argument: what the graph reads and what the eager run uses."""

    node: int | fx.Node
    value: int


def pair(value: Value) -> tuple[fx.Node, torch.Tensor]:
    return value.node, value.tensor


def is_pair(argument: Any) -> bool:
    return isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[0], fx.Node)


def unzip(argument: Any) -> tuple[Any, Any]:
    """Split nested arguments of pairs and sizes into (graph arguments, eager arguments)."""
    if is_pair(argument):
        return argument
    if isinstance(argument, Size):
        return argument.node, argument.value
    if isinstance(argument, (tuple, list)):
        parts = [unzip(item) for item in argument]
        return type(argument)(p[0] for p in parts), type(argument)(p[1] for p in parts)
    if isinstance(argument, dict):
        split = {key: unzip(item) for key, item in argument.items()}
        return {key: item[0] for key, item in split.items()}, {key: item[1] for key, item in split.items()}
    return argument, argument


@dataclass(frozen=True)
class Truth:
    """What is true of a graph on one input, by numerics.

    uniform maps each adapter (None: no adapter) to the outputs with every row under it. owners is bool [B, elements]:
    which requests an output element depends on, under any of the adapters. noise is how far a change of the input by
    1e-6 of itself moves these outputs in fp64: random products may be ill-conditioned.
    """

    uniform: dict[str | None, torch.Tensor]
    owners: torch.Tensor
    noise: float

    def mixes(self) -> bool:
        """Whether some output element depends on several requests."""
        return bool((self.owners.sum(0) > 1).any())

    def wrong(self, got: torch.Tensor, names: Sequence[str | None], tolerance: float = 1e-4) -> tuple[int, int]:
        """(wrong elements among those of one request, other elements that no adapter explains)."""
        stacked = torch.stack([self.uniform[name].flatten() for name in names])
        scale = max(tolerance * max(1.0, float(stacked.abs().max())), 3 * self.noise)
        near = (got.flatten()[None] - stacked).abs() <= scale
        alone, count = (near | ~self.owners).all(0), self.owners.sum(0)
        return int(((count == 1) & ~alone).sum()), int(((count != 1) & ~near.any(0)).sum())


@torch.no_grad()
def truth_of(gm: nn.Module, x: torch.Tensor, adapters: Mapping[str, Adapter], draws: int = 2) -> Truth:
    """Run the graph under each adapter for all rows, and once more for every redraw of every request."""
    uniform: dict[str | None, torch.Tensor] = {}
    owners = torch.zeros(len(x), 0, dtype=torch.bool)
    generator, noise = torch.Generator().manual_seed(5), 0.0
    for name in (None, *adapters):
        module = merged(gm, None if name is None else adapters[name])
        uniform[name] = module(x.clone())
        exact, near = (
            copy.deepcopy(module).double(),
            x.double() * (1 + 1e-6 * torch.randn(x.shape, generator=generator)),
        )
        noise = max(noise, float((exact(near) - exact(x.double())).abs().max()))
        owners = owners if owners.numel() else torch.zeros(len(x), uniform[name].numel(), dtype=torch.bool)
        for index in range(len(x)):
            for _ in range(draws):
                other = x.clone()
                other[index] = torch.randn(x.shape[1:], generator=generator)
                owners[index] |= (module(other) - uniform[name]).abs().flatten() > 1e-5
    return Truth(uniform, owners, noise)
