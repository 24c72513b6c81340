# SPDX-License-Identifier: Apache-2.0
"""Compares the overlay's patch points with source text that cannot be installed here, without importing any of it.

    python tests/versions/check_source.py TREE [TREE ...] [--version V]

A TREE is a folder with `vllm_ascend/` or `vllm/` in it: an unpacked source distribution, a checkout, a site-packages.
Without --version it is read from `vllm_ascend/_version.py`. The answer is JSON; exit status 0 if all points are as
recorded and nothing goes around them, 1 if not, 2 if it cannot be told.

What this can show is that a point exists and takes the same arguments. What stock does with it has to be read, and a
version counts as supported only when the overlay has been run on it (`dp_sync_patch/stock.py`).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dp_sync_patch.patches import TRIGGERS, PatchPoint, points_of

# What the overlay reads or writes without patching it (live.py, metadata_sync.py, draft_passes.py). Each entry lists
# alternatives, as live.py tries them; one has to exist.
READS = (
    (
        "vllm_ascend.ascend_forward_context:_mc2_tokens_capacity",
        "vllm_ascend.worker.model_runner_v1:NPUModelRunner._init_mc2_tokens_capacity",
    ),
    (
        "vllm_ascend.ops.fused_moe.moe_comm_method:_MoECommMethods",
        "vllm_ascend.ops.moe.moe_comm_method:_MoECommMethods",
    ),
    ("vllm_ascend.utils:get_ascend_device_type", "vllm_ascend.utils:get_ascend_soc_version"),
    ("vllm_ascend.utils:is_moe_model",),
)
# Imports in here bypass nothing: the overlay refuses model runner v2 (DSP146).
_RUNNER_V2 = "vllm_ascend.worker.v2."
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceError(Exception):
    """The trees do not hold what has to be read."""


class Source:
    """Python modules found below some folders, by dotted name."""

    def __init__(self, *roots: Path) -> None:
        self._roots = roots
        self.module = cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        parts = Path(*name.split("."))
        for root in self._roots:
            for path in (root / parts.with_suffix(".py"), root / parts / "__init__.py"):
                if path.is_file():
                    return ast.parse(path.read_text(encoding="utf-8"), str(path))
        return None

    def modules(self, package: str, words: set[str]) -> Iterator[tuple[str, ast.Module]]:
        """Those of a package whose text has one of the words in it; parsing all would take half a minute."""
        found: dict[Path, Path] = {}
        for root in self._roots:
            for path in (root / package).rglob("*.py"):
                found.setdefault(path.relative_to(root), path)
        for relative, path in sorted(found.items()):
            text = path.read_text(encoding="utf-8")
            if any(word in text for word in words):
                parts = relative.with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                if (tree := self.module(name)) is not None:
                    yield name, tree

    def find(self, module: str, name: str) -> ast.AST | None:
        """The definition that `name` leads to ("Class.method", "function", a variable), through imports by name."""
        tree = self.module(module)
        if tree is None:
            return None
        first, _, rest = name.partition(".")
        # The last one wins, as when the module runs; of two imports under a condition, one that leads somewhere.
        for statement in reversed(list(_statements(tree.body))):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == first:
                        found = self.find(_absolute(module, statement), ".".join(filter(None, (alias.name, rest))))
                        if found is not None:
                            return found
            elif first in _names(statement):
                return _member(statement, rest) if rest else statement
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or class, those inside `if` and `try` included: both branches, since a condition is not evaluated."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test).rpartition(".")[2] == "TYPE_CHECKING":
            yield from _statements(statement.orelse)
            continue
        for field in ("body", "handlers", "orelse", "finalbody"):
            inner = getattr(statement, field, [])
            if isinstance(statement, ast.If | ast.Try | ast.With):
                for part in inner:
                    yield from _statements(part.body if isinstance(part, ast.ExceptHandler) else [part])


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, _Function | ast.ClassDef):
        return {statement.name}
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _member(statement: ast.stmt, name: str) -> ast.AST | None:
    """Of the class itself, never of a base class: there the overlay refuses an inherited one as well."""
    if not isinstance(statement, ast.ClassDef):
        return None
    found = [inner for inner in _statements(statement.body) if name in _names(inner)]
    return found[-1] if found else None


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".")[: -statement.level]  # of a plain module; packages do not import by `from .` here
    return ".".join([*package, *filter(None, [statement.module])])


class _Default:
    """A default value as it stands in the source; literals in the form that `repr` gives them."""

    def __init__(self, node: ast.expr) -> None:
        if isinstance(node, ast.Lambda):
            self._text = "<function>"
            return
        try:
            self._text = repr(ast.literal_eval(node))
        except ValueError:
            self._text = ast.unparse(node)

    def __repr__(self) -> str:
        return self._text


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As `dp_sync_patch.patches.describe` gives it for the imported function."""
    arguments, kinds = function.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    found: list[inspect.Parameter] = []

    def add(name: str, kind: Any, default: ast.expr | None = None) -> None:
        found.append(kinds(name, kind, default=kinds.empty if default is None else _Default(default)))

    for index, (argument, default) in enumerate(zip(plain, defaults, strict=True)):
        positional_only = index < len(arguments.posonlyargs)
        add(argument.arg, kinds.POSITIONAL_ONLY if positional_only else kinds.POSITIONAL_OR_KEYWORD, default)
    if arguments.vararg:
        add(arguments.vararg.arg, kinds.VAR_POSITIONAL)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        add(argument.arg, kinds.KEYWORD_ONLY, default)
    if arguments.kwarg:
        add(arguments.kwarg.arg, kinds.VAR_KEYWORD)
    return str(inspect.Signature(found))


def as_written(recorded: str) -> str:
    """A recorded signature with enum members as the source names them: their values are not in the text."""
    return re.sub(r"<([\w.]+): [^>]*>", r"\1", recorded)


def check_point(source: Source, point: PatchPoint) -> str:
    """ "found", "missing", or what is different."""
    found = source.find(point.module, point.name)
    if found is None:
        return "missing"
    if not isinstance(found, _Function):
        return f"no function any more: {type(found).__name__}"
    taken, wanted = signature(found), as_written(point.signature)
    return "found" if taken == wanted else f"takes {taken} instead of {wanted}"


def importers(source: Source, points: list[PatchPoint]) -> dict[str, list[str]]:
    """Patched functions, and the modules that bind one by name while they are imported, without a point of their own.

    An import inside a function sees the patched attribute, so it is not one of them.
    """
    functions = {point.name for point in points if "." not in point.name}
    patched = {(point.module, point.name) for point in points}
    found: dict[str, list[str]] = {name: [] for name in sorted(functions)}
    for module, tree in source.modules("vllm_ascend", functions):
        for statement in _statements(tree.body):
            for alias in statement.names if isinstance(statement, ast.ImportFrom) else []:
                if alias.name in functions and (module, alias.asname or alias.name) not in patched:
                    found[alias.name].append(module)
    return {name: modules for name, modules in found.items() if modules}


def overrides(source: Source, points: list[PatchPoint]) -> list[str]:
    """Classes that replace a patched method of a base class; by the base's name alone."""
    patched: dict[str, set[str]] = {}
    for point in points:
        owner, _, method = point.name.rpartition(".")
        if owner:
            patched.setdefault(owner, set()).add(method)
    found = []
    for module, tree in source.modules("vllm_ascend", set(patched)):
        for statement in _statements(tree.body):
            if not isinstance(statement, ast.ClassDef):
                continue
            bases = {ast.unparse(base).rpartition(".")[2] for base in statement.bases}
            methods = {name for inner in _statements(statement.body) for name in _names(inner)}
            for base in bases & patched.keys():
                found += [f"{module}:{statement.name}.{name}" for name in sorted(methods & patched[base])]
    return found


def unreadable(source: Source) -> list[str]:
    """What the overlay reads and this source does not have."""
    return [
        " or ".join(alternatives)
        for alternatives in READS
        if not any(source.find(*target.split(":")) for target in alternatives)
    ]


def check(roots: list[Path], version: str) -> dict[str, Any]:
    """All findings for one version of vllm-ascend.

    Raises:
        SourceError: one of the two packages is not in the trees.
    """
    source = Source(*roots)
    for package in ("vllm", "vllm_ascend"):
        if source.module(package) is None:
            raise SourceError(f"no {package}/ in {', '.join(map(str, roots))}")
    points = [point for unit in TRIGGERS for point in points_of(unit, version)]
    return {
        "vllm_ascend": version,
        "points": {point.target: check_point(source, point) for point in points},
        "imported_by_name_elsewhere": importers(source, points),
        "overridden_in": overrides(source, points),
        "not_readable": unreadable(source),
    }


def is_clean(findings: dict[str, Any]) -> bool:
    """All points as recorded and nothing around them. An override needs judgement: it may be in a class nobody uses."""
    elsewhere = [module for modules in findings["imported_by_name_elsewhere"].values() for module in modules]
    around = [module for module in elsewhere if not module.startswith(_RUNNER_V2)] + findings["not_readable"]
    return not around and set(findings["points"].values()) == {"found"}


def read_version(roots: list[Path]) -> str:
    """From the file that setuptools_scm writes into distributions.

    Raises:
        SourceError: there is none; a checkout does not have it.
    """
    for root in roots:
        path = root / "vllm_ascend" / "_version.py"
        if path.is_file() and (found := re.search(r"^__version__ = .*'([^']+)'$", path.read_text(), re.MULTILINE)):
            return found[1]
    raise SourceError("no vllm_ascend/_version.py with a version in it: give --version")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the patch points with source text.")
    parser.add_argument("trees", metavar="TREE", nargs="+", type=Path)
    parser.add_argument("--version", help="of vllm-ascend")
    args = parser.parse_args()
    try:
        findings = check(args.trees, args.version or read_version(args.trees))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(findings, indent=2))
    return 0 if is_clean(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
