"""Small faults that a test should find: one expression of a file changed, such as a comparison, a sum, a constant, a
condition, a result, the order of two arguments, or a call left out."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "trimtab"
COMPARE = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
COMPUTE = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
}
# Calls that can be left out of a chain and leave something of the same shape, or of the shape turned round.
DROPPED_CALLS = {"t", "detach", "sqrt", "square", "abs", "conj"}
# Calls whose first two arguments may change places.
SYMMETRIC = {"min", "max", "transpose", "equal", "promote_types", "maximum", "minimum", "addcmul_"}
# What a person reads, and no computation: no mutants in there.
WORDS = {"description", "match", "message"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: where it is, and what stands there before and after."""

    file: str
    place: str
    before: str
    after: str
    number: int
    """Which of the changes of this kind at this place."""
    around: str = ""
    """A digest of the function that it is in: the result of a changed one is worth nothing."""
    lines: tuple[int, int] = field(default=(0, 0), compare=False, repr=False)
    """The first and the last line of what is changed."""

    def __str__(self) -> str:
        return f"{self.file} {self.place}: `{self.before}` -> `{self.after}`"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be changed into."""

    def like(**new: Any) -> Any:
        made = copy.deepcopy(node)
        for name, value in new.items():
            setattr(made, name, value)
        return made

    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARE:
            yield like(ops=[COMPARE[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTE:
            yield like(op=COMPUTE[type(op)]())
        case ast.BoolOp(op=op):
            yield like(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=inside) | ast.UnaryOp(op=ast.USub(), operand=inside):
            yield inside
        case ast.Constant(value=bool() as value):
            yield like(value=not value)
        case ast.Constant(value=int() as value):
            yield like(value=value + 1)
        case ast.Constant(value=float() as value):
            yield like(value=2 * value if value else 1.0)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield like(value=ast.Constant(None))
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield like(test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Call(func=ast.Attribute(value=inside, attr=name)) if name in DROPPED_CALLS:
            yield inside
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in SYMMETRIC:
            pass
        case ast.Call(args=[first, second, *more]) if not {ast.Starred} & {type(first), type(second)}:
            yield like(args=[second, first, *more])


def mutants(file: str) -> list[Mutant]:
    """All mutants of one file."""
    return [mutant for mutant, _ in _each_with_tree(file)]


def mutated(mutant: Mutant) -> ast.Module:
    """The whole file with this one change. Raises KeyError where the file has no such mutant."""
    for other, tree in _each_with_tree(mutant.file):
        if other == mutant:
            return tree
    raise KeyError(str(mutant))


def _each_with_tree(file: str) -> Iterator[tuple[Mutant, ast.Module]]:
    """Each mutant with the tree of its file, which has the change for as long as nobody asks for the next."""
    tree = ast.parse((SOURCE / file).read_text("utf-8"))
    counted: dict[tuple[str, str, str], int] = defaultdict(int)
    inside: dict[str, str] = {}

    def walk(node: ast.AST, place: str) -> Iterator[tuple[Mutant, ast.Module]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params") or (
                isinstance(node, ast.keyword) and node.arg in WORDS
            ):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _skipped(child):
                    continue
                inner = place
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    inner = f"{place}.{child.name}" if place else child.name
                    if isinstance(child, ast.FunctionDef):
                        inside[inner] = inside.get(place) or hashlib.sha256(ast.dump(child).encode()).hexdigest()[:12]
                for changed in changes(child):
                    text = (place or "(file)", _line(child), _line(changed))
                    if text[1] == text[2]:
                        continue
                    mutant = Mutant(file, *text, counted[text], inside.get(place, ""), _lines(child))
                    counted[text] += 1
                    _put(node, name, index, changed)
                    yield mutant, tree
                    _put(node, name, index, child)
                if not isinstance(child, ast.Raise):
                    yield from walk(child, inner)

    yield from walk(tree, "")


def _put(node: ast.AST, name: str, index: int | None, value: ast.AST) -> None:
    if index is None:
        setattr(node, name, value)
    else:
        getattr(node, name)[index] = value


def _lines(node: Any) -> tuple[int, int]:
    part = node.test if isinstance(node, ast.If) else node
    return part.lineno, part.end_lineno


def _skipped(node: ast.AST) -> bool:
    """Words for people, and names of types."""
    if isinstance(node, ast.FunctionDef):
        return node.name in ("extra_repr", "__repr__", "__str__")
    if isinstance(node, ast.Subscript):  # Literal["a", "b"], tuple[int, ...]
        return isinstance(node.value, ast.Name) and node.value.id in ("Literal", "tuple", "list", "dict", "type")
    return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom)


def _line(node: ast.AST) -> str:
    """The first line of a piece of source, or the condition of a statement that is an if."""
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]
