"""Meta-tests: which room may import which, what is public, what importing costs, and how large a file may grow."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("fxlora", "passes", "kernels")
ALLOWED = {
    "kernels": {"fxlora.kernels"},
    "passes": {"fxlora.passes", "fxlora.kernels"},
    "fxlora": {"fxlora", "fxlora.passes", "fxlora.kernels"},
    "tests": {"fxlora", "fxlora.passes", "fxlora.kernels", "tests"},
}
PUBLIC = {
    "LoraModule",
    "Runtime",
    "apply",
    "attach",
    "capture",
    "compile",
    "continuous_batching",
    "dump",
    "runtime",
    "to_networkx",
}
FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES = 400, 500, 60
# What only the extras bring: never at module level, so that `import fxlora` needs none of it.
EXTRAS = {"transformers", "peft", "typer", "rich", "tqdm", "gguf"}
USES_EXTRAS_AT_IMPORT = ("fxlora/commands/", "fxlora/demo/run.py", "fxlora/demo/show.py")


@cache
def sources() -> tuple[Path, ...]:
    """Every Python file of the project, relative to its root."""
    found = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")]
    return tuple(sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts))


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """The absolute names an import statement reads; `from a import b` gives a and a.b, as b may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported, without those under `if TYPE_CHECKING`."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from at_import(handler.body)


def room_of(name: str) -> str | None:
    """The room a dotted name lives in, None for a foreign package."""
    for room in ("fxlora.kernels", "fxlora.passes"):
        if name == room or name.startswith(room + "."):
            return room
    return name.split(".")[0] if name.split(".")[0] in ("fxlora", "tests") else None


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    for node in ast.walk(tree(path)):
        names = list(imported(node))
        # `from fxlora import passes` names the room; the package in front of it is then only the way there.
        if isinstance(node, ast.ImportFrom) and node.module == "fxlora":
            names = names[1:]
        for name in names:
            room = room_of(name)
            assert room is None or room in ALLOWED[path.parts[0]], f"{path} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_rooms_are_never_imported_by_their_bare_names(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        for name in imported(node):
            assert name.split(".")[0] not in ("kernels", "passes"), f"{path} imports {name}; import fxlora.{name}"


@pytest.mark.parametrize("path", [path for path in sources() if path.parts[0] != "tests"], ids=str)
def test_triton_stays_in_the_kernels_and_extras_stay_inside_functions(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if any(name.split(".")[0] == "triton" for name in imported(node)):
            assert path.parts[0] == "kernels", f"{path} imports triton"
    if str(path).startswith(USES_EXTRAS_AT_IMPORT):
        return
    for statement in at_import(tree(path).body):
        for name in imported(statement):
            assert name.split(".")[0] not in EXTRAS, f"{path} imports {name} when it is imported itself"


def test_passes_reach_the_kernels_through_ops_and_errors_only() -> None:
    for path in sources():
        if path.parts[0] != "passes":
            continue
        for node in ast.walk(tree(path)):
            for name in imported(node):
                if room_of(name) == "fxlora.kernels" and name != "fxlora.kernels":
                    assert name.split(".")[2] in ("ops", "errors"), f"{path} imports {name}"


def test_public_names() -> None:
    import fxlora

    names = set(fxlora.__all__)
    assert names >= PUBLIC
    for name in names:
        assert getattr(fxlora, name) is not None
    assert list(fxlora.__all__) == sorted(fxlora.__all__)


def test_import_is_lean() -> None:
    script = """
import json, sys
import fxlora
import torch
heavy = [name for name in ("transformers", "peft", "triton", "typer", "rich", "gguf") if name in sys.modules]
print(json.dumps({"heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {"heavy": [], "cuda": False}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= (TEST_FILE_LINES if path.parts[0] == "tests" else FILE_LINES), f"{path} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            assert length <= FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_every_function_is_annotated_and_every_module_says_what_it_is(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), f"{path} has no docstring"
    if len(module.body) > 1:
        assert "__future__.annotations" in [name for node in module.body for name in imported(node)], path
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.returns is not None, f"{path}: {node.name} has no return type"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        assert set(bare) <= {"self", "cls"} or is_kernel(node), f"{path}: {node.name}({', '.join(bare)}) lacks types"


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the docstring, which do not count: a long explanation makes no function hard to read."""
    first = node.body[0]
    has_one = ast.get_docstring(node, clean=False) is not None
    return (first.end_lineno or first.lineno) - first.lineno + 1 if has_one else 0


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles this function: its pointers have no type a checker knows."""
    return any(
        "jit" in ast.unparse(decorator) or "autotune" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def test_the_installed_packages_are_the_rooms() -> None:
    import fxlora
    import fxlora.kernels
    import fxlora.passes

    assert Path(fxlora.__file__).parent == ROOT / "fxlora"
    assert Path(fxlora.passes.__file__).parent == ROOT / "passes"
    assert Path(fxlora.kernels.__file__).parent == ROOT / "kernels"
