"""The size rules: what ruff, mypy and import-linter do not check. Prints a table and the violations."""

from __future__ import annotations

import ast
import statistics
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_LINES = 150
MIN_RAISES_PER_ASSERT = 5

LIBRARY = ("distmuon", "kernels")
EVERYTHING = (*LIBRARY, "benchmarks", "tests", "setup.py")
BANNED_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
BANNED_KEYWORDS = {"shell": True, "weights_only": False}
# Arithmetic and placement must run, and be tested, without a process group; import-linter sees only "torch".
RANK_FREE = {
    *(
        "adamw",
        "batches",
        "binding",
        "blocks",
        "bricks",
        "bucket",
        "clock",
        "coefficients",
        "completion",
        "config",
        "errors",
    ),
    *("groups", "link", "machine", "newton_schulz", "owners", "placement", "plan", "planner", "predict", "routing"),
    *("scaling", "simulate", "splits", "timeline", "update", "waves"),
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository and its text."""

    path: Path
    text: str

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def in_library(self) -> bool:
        return self.path.parts[0] in LIBRARY


def read_sources(root: Path) -> list[Source]:
    """All Python files of the repository; links in ``distmuon`` count once, by the folders they lead to."""
    found: list[Path] = []
    for name in EVERYTHING:
        top = root / name
        found += [top] if top.is_file() else [p for p in top.rglob("*.py") if not _through_link(p, root)]
    return [Source(p.relative_to(root), p.read_text(encoding="utf-8")) for p in sorted(set(found))]


def _through_link(path: Path, root: Path) -> bool:
    return any((root / parent).is_symlink() for parent in path.relative_to(root).parents)


def check(root: Path) -> list[str]:
    """Every violation in the repository, one sentence each."""
    sources = read_sources(root)
    problems = [problem for source in sources for problem in check_file(source)]
    return [*problems, *check_library([s for s in sources if s.in_library]), *check_requirements(root)]


def check_file(source: Source) -> Iterator[str]:
    """Rules for one file."""
    if source.lines > MAX_FILE_LINES:
        yield f"{source.path}: {source.lines} lines, at most {MAX_FILE_LINES}; split it by concern"
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                where = f"{source.path}:{node.lineno}"
                yield f"{where}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}; split it"
    if source.path.parts[0] != "tests":
        yield from _banned(source)
    if source.in_library:
        if not ast.get_docstring(source.tree):
            yield f"{source.path}: the module has no docstring"
        yield from _undescribed(source)
    if source.path.parts[0] == "kernels" or (
        source.path.parts[0] == "distmuon" and source.path.stem in RANK_FREE and len(source.path.parts) == 2
    ):
        yield from _rank_aware(source)


def _banned(source: Source) -> Iterator[str]:
    may_print = source.path.parts[0] == "benchmarks" or source.path.parts[:2] in {
        ("distmuon", "cli.py"),
        ("distmuon", "cli"),
        ("distmuon", "__main__.py"),
    }
    for node in source.nodes:
        where = f"{source.path}:{getattr(node, 'lineno', 0)}"
        for module in _imported(node):
            if module.split(".")[0] in BANNED_MODULES:
                yield f"{where}: imports {module}, which can run code from a file"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "os.system", "yaml.load"}:
            yield f"{where}: calls {called}"
        if called == "print" and not may_print:
            yield f"{where}: prints outside the command line layer; use logging"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in BANNED_KEYWORDS and value is BANNED_KEYWORDS[keyword.arg]:
                yield f"{where}: passes {keyword.arg}={value} to {called}"


def _rank_aware(source: Source) -> Iterator[str]:
    for node in source.nodes:
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if chain == "torch.distributed" or any(
            module == "torch.distributed" or module.startswith("torch.distributed.") for module in _imported(node)
        ):
            where = f"{source.path}:{getattr(node, 'lineno', 0)}"
            yield f"{where}: uses torch.distributed; collectives belong to comm"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _undescribed(source: Source) -> Iterator[str]:
    for name, node in _public(source.tree.body, ""):
        where = f"{source.path}:{node.lineno}"
        decorators = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"overload", "override", "setter"}:
            yield f"{where}: {name} has no docstring"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _typed(node, method="." in name):
            yield f"{where}: {name} is not fully typed"


def _public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def _typed(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> bool:
    args = [*node.args.posonlyargs, *node.args.args]
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    named = args[1:] if method and not static else args
    rest = [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    return node.returns is not None and all(a.annotation for a in [*named, *node.args.kwonlyargs, *rest])


def check_library(sources: list[Source]) -> Iterator[str]:
    """Rules for the library as a whole: the median file and the share of asserts."""
    if not sources:
        return
    median = statistics.median(s.lines for s in sources)
    if median > MAX_MEDIAN_LINES:
        yield f"median file has {median:g} lines, at most {MAX_MEDIAN_LINES}"
    raises, asserts = count_raises_and_asserts(sources)
    if raises < MIN_RAISES_PER_ASSERT * asserts:
        yield (
            f"{raises} raises for {asserts} asserts, at least {MIN_RAISES_PER_ASSERT} to 1: "
            "what a user can cause is raised, only own invariants are asserted"
        )


def count_raises_and_asserts(sources: list[Source]) -> tuple[int, int]:
    """Numbers of raise and assert statements."""
    nodes = [node for source in sources for node in source.nodes]
    return sum(isinstance(n, ast.Raise) for n in nodes), sum(isinstance(n, ast.Assert) for n in nodes)


def check_requirements(root: Path) -> Iterator[str]:
    """No requirement may be ``apex``: that name on PyPI is a web toolkit, not NVIDIA's library."""
    for path, requirement in _requirements(root):
        if _project(requirement) == "apex":
            yield f"{path.relative_to(root)}: requires {requirement!r}, which is not NVIDIA's apex on PyPI"


def _requirements(root: Path) -> Iterator[tuple[Path, str]]:
    setup, pyproject = root / "setup.py", root / "pyproject.toml"
    if setup.is_file():
        for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield setup, node.value
    if pyproject.is_file():
        table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
        project = table.get("project", {})
        groups = [
            *project.get("optional-dependencies", {}).values(),
            *table.get("dependency-groups", {}).values(),
        ]
        for group in [
            table.get("build-system", {}).get("requires", []),
            project.get("dependencies", []),
            *groups,
        ]:
            yield from ((pyproject, item) for item in group if isinstance(item, str))
    for path in sorted(root.glob("*requirements*.txt")):
        yield from ((path, line) for line in path.read_text(encoding="utf-8").splitlines())


def _project(text: str) -> str:
    try:
        return canonicalize_name(Requirement(text.split("#")[0].strip()).name)
    except InvalidRequirement:
        return ""


def table(sources: list[Source]) -> str:
    """Lines per library file, longest first, then the totals."""
    rows = [f"{s.lines:5d}  {s.path}" for s in sorted(sources, key=lambda s: -s.lines)]
    raises, asserts = count_raises_and_asserts(sources)
    median = statistics.median([s.lines for s in sources] or [0])
    total = sum(s.lines for s in sources)
    rows.append(f"{total:5d}  in {len(sources)} files, median {median:g}, {raises} raises, {asserts} asserts")
    return "\n".join(rows)


def main() -> int:
    """Check this repository; the exit status."""
    root = Path(__file__).resolve().parents[2]
    print(table([source for source in read_sources(root) if source.in_library]))
    problems = check(root)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
