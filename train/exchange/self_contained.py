"""One file that needs nothing of ours: a module and what it uses of our packages, by their syntax trees."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import indent

_ROOT = Path(__file__).parents[2]
_OURS = ("ddm", "experts", "router", "serve", "train")


@dataclass(frozen=True)
class _Module:
    """What a module has at its top: definitions by name, and where imported names come from.

    definitions: the source lines of each, and the names and attributes that it uses
    ours: `name -> (module, name there)`, None in place of the latter for a whole module of ours
    others: `name -> its import statement`
    """

    definitions: dict[str, tuple[str, set[str]]]
    ours: dict[str, tuple[str, str | None]]
    others: dict[str, str]


@dataclass
class _Collected:
    """Definitions in the order in which they can be executed, and the imports that they need."""

    imports: set[str] = field(default_factory=set)
    bodies: list[str] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)  # of a name, its module
    whole: dict[str, set[str]] = field(
        default_factory=dict
    )  # of a module's name, what is used of it

    def add(self, module: str, name: str) -> None:
        """The definition of a name in a module, after those that it uses."""
        found = _read(module)
        if name in found.others:
            self.imports.add(found.others[name])
        elif name in found.ours:
            source, original = found.ours[name]
            if original is None:
                return  # its attributes are added where they are used
            self.add(source, original)
            if original != name and name not in self.seen:
                self.seen[name] = module
                self.bodies.append(f"{name} = {original}")
        elif name in found.definitions and name not in self.seen:
            body, used = found.definitions[name]
            self.seen[name] = module
            for other in sorted(used):
                self._add_used(found, module, other)
            self.bodies.append(body)
        else:
            assert self.seen.get(name, module) == module or name not in found.definitions, (
                f"{module} and {self.seen[name]} both define {name}"
            )

    def _add_used(self, found: _Module, module: str, other: str) -> None:
        owner, _, attribute = other.partition(".")
        if attribute and (source := found.ours.get(owner)) and source[1] is None:
            self.whole.setdefault(owner, set()).add(attribute)
            self.add(source[0], attribute)
        elif not attribute:
            self.add(module, other)


def self_contained(module: str, head: str, public: Sequence[str]) -> str:
    """The source of a module of ours with all that it uses of our packages, after the text `head`.

    All is defined in a function that returns the names `public`: diffusers executes a file anew for each part of a
    pipeline, and classes of one execution must not meet those of another. Annotations are not evaluated, and what only
    they use is left out.
    """
    collected = _Collected(imports={"from types import SimpleNamespace"})
    for name in _read(module).definitions:
        collected.add(module, name)
    for name, attributes in collected.whole.items():
        values = ", ".join(f"{attribute}={attribute}" for attribute in sorted(attributes))
        collected.bodies.append(f"{name} = SimpleNamespace({values})")
    names = ", ".join(public)
    lines = [head, "from __future__ import annotations", "", *sorted(collected.imports)]
    body = indent("\n\n".join([*collected.bodies, f"return {names}"]), "    ")
    return "\n".join(lines) + f"\n\n\ndef _define():\n{body}\n\n\n{names} = _define()\n"


@cache
def _read(module: str) -> _Module:
    path = _ROOT / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = _Module({}, {}, {})
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(found, node)
        elif names := _defined(node):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            body = "\n".join(lines[first - 1 : node.end_lineno])
            for name in names:
                before, used = found.definitions.get(name, ("", set()))
                whole = f"{before}\n\n\n{body}" if before else body
                found.definitions[name] = (whole, used | _used(node) - set(names))
    return found


def _note_import(found: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        bound = alias.asname or alias.name.partition(".")[0]
        one = ast.unparse(
            ast.Import([alias])
            if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, [alias], 0)
        )
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in _OURS:
            found.others[bound] = one
            continue
        inner = f"{node.module}.{alias.name}"
        is_module = (_ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
        source = (inner, None) if is_module else (str(node.module), alias.name)
        found.ours[bound] = source


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines, or whose attributes it sets."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def _used(node: ast.AST) -> set[str]:
    """The names, and attributes of names, that code uses outside annotations."""
    found = set()
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            # dataclasses look for this one by name.
            found |= {"ClassVar"} & (
                {n.id for n in ast.walk(value) if isinstance(n, ast.Name)} if value else set()
            )
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                found |= _used(child)
    if isinstance(node, ast.Name):
        found.add(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        found.add(f"{node.value.id}.{node.attr}")
    return found
