"""What ``pyfast.patch`` cannot replace in a model, and what would: found by reading its source."""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_FUNCTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward", "dropout")
_UNREADABLE = (KeyError, OSError, TypeError, SyntaxError, ValueError, RecursionError)


def notes_on(model: torch.nn.Module) -> list[str]:
    """Sentences for the report: functional calls, and attention that a configuration chooses."""
    notes = []
    found: dict[str, list[str]] = {}
    unread: list[str] = []
    sources: dict[str, dict[str, ast.ClassDef]] = {}
    for kind in dict.fromkeys(base for m in model.modules() for base in type(m).__mro__):
        package = kind.__module__.partition(".")[0]
        if package in ("torch", "pyfast", "builtins", "typing", "abc"):
            continue
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__ not in sources:
            sources[kind.__module__] = _classes(kind.__module__)
        definition = sources[kind.__module__].get(kind.__qualname__) or _own_source(kind)
        if definition is not None:
            for function in _calls(definition, vars(sys.modules[kind.__module__])):
                found.setdefault(function, []).append(name)
        elif issubclass(kind, torch.nn.Module):
            unread.append(name)
    if found:
        places = "; ".join(f"F.{name} in {_few(kinds)}" for name, kinds in found.items())
        notes.append(
            f"functions that patch does not replace, by a search of the source: {places}. "
            "pyfast.activate() sends them through pyfast"
        )
    if unread:
        notes.append(f"not searched for such functions, for want of source: {_few(unread)}")
    implementation = _attention_implementation(model)
    if implementation is not None and implementation != "pyfast":
        notes.append(
            f"its attention is chosen by config._attn_implementation, now {implementation!r}: "
            "pyfast.integrations.transformers.register(), then "
            'model.set_attn_implementation("pyfast")'
        )
    return notes


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _attention_implementation(model: torch.nn.Module) -> str | None:
    """That of the outermost module that has transformers' setting."""
    for module in model.modules():
        name = None
        with contextlib.suppress(Exception):  # the property of an unknown class
            name = getattr(vars(module).get("config"), "_attn_implementation", None)
        if isinstance(name, str):
            return name
    return None


def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The definition of every class of a module, by qualified name; empty without source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except _UNREADABLE:
        return {}
    return dict(_named_classes(tree, ""))


def _own_source(kind: type) -> ast.ClassDef | None:
    """The definition of a class whose module has no file: a notebook's."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except _UNREADABLE:
        return None
    return node if isinstance(node, ast.ClassDef) else None


def _named_classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _named_classes(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _named_classes(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _named_classes(child, prefix)


def _calls(definition: ast.ClassDef, names: dict[str, Any]) -> list[str]:
    """Which of the functions are called in a class whose module has these names."""
    wanted = {getattr(F, function): function for function in _FUNCTIONS}
    called = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Call):
            target = _resolve(node.func, names)
            called |= {name for function, name in wanted.items() if function is target}
    return [function for function in _FUNCTIONS if function in called]


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a dotted name stands for in a module; None if it is no such name."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and node.attr.isidentifier():
        owner = _resolve(node.value, names)
        return vars(owner).get(node.attr) if inspect.ismodule(owner) else None
    return None
