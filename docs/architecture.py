"""The picture of the house in CONTRIBUTING.md, drawn from the docstrings and imports of the code.

python docs/architecture.py    writes it anew; tests/test_architecture.py fails where it is out of date
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by docs/architecture.py -->\n```text\n", "```\n<!-- drawn until here -->\n"
WIDTH = 120  # characters in a line

LAYERS = ("", "switching", "training", "monitoring", "rules", "core", "backends", "foundation", "kernels")
"""The packages from top to bottom; "" is `fastclip` itself. A module imports from its own and from those below it."""

TITLES = {"": "fastclip", "kernels": "kernels/"}


def modules() -> dict[str, Path]:
    """The file of each module, by its dotted name."""
    folders = ((ROOT, "fastclip/**/*.py"), (ROOT / "kernels", "*.py"), (ROOT / "kernels", "*.pyi"))
    files = [(path.relative_to(folder), path) for folder, pattern in folders for path in sorted(folder.glob(pattern))]
    return {_name(place): path for place, path in files if "kernels" not in place.parts}  # which may be linked there


def _name(place: Path) -> str:
    """The dotted name of a module at a place in the repository, or in `kernels/`."""
    parts = place.with_suffix("").parts
    return ".".join(parts if parts[0] == "fastclip" else ("fastclip", "kernels", *parts)).removesuffix(".__init__")


def layer_of(module: str) -> str:
    """The name of a module's layer."""
    name = module.split(".")[1] if module.count(".") else ""
    return name if name in LAYERS else ""


def imports_of(module: str, known: dict[str, Path]) -> set[str]:
    """The modules of fastclip that a module imports, anywhere in it: also inside of functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = _package(module, known).rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (parent, node.module)))
            found |= {name if (name := f"{source}.{alias.name}") in known else source for alias in node.names}
    return {name for name in found if name in known and name != module}


def _package(module: str, known: dict[str, Path]) -> str:
    return module if known[module].name == "__init__.py" else module.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules()
    return {module: imports_of(module, known) for module in known}


def draw() -> str:
    """The layers from top to bottom, and in each its modules: those that import others come first."""
    edges, known = graph(), modules()
    order = _from_the_top(edges)
    lines = []
    for layer in LAYERS:
        members = [module for module in order if layer_of(module) == layer]
        package = f"fastclip.{layer}".rstrip(".")
        below = {layer_of(target) for module in members for target in edges[module]} - {layer}
        lines.append(f"┌{'─' * (WIDTH - 2)}┐")
        lines.append(_row(f"{TITLES.get(layer, layer).upper():13}{_summary(known[package])}"))
        for module in members:
            if known[module].name != "__init__.py":
                name = module.removeprefix(f"{package}.")
                lines.append(_row(f"  {name:21}{_summary(known[module])}"))
        arrow = f"▼ {', '.join(name for name in LAYERS if name in below)}" if below else ""
        lines.append(f"└{'─' * (WIDTH - 2)}┘")
        lines += [f"      {arrow}"] if arrow else []
    return "\n".join(lines) + "\n"


def _from_the_top(edges: dict[str, set[str]]) -> list[str]:
    """The modules in an order in which each comes ahead of all that it imports."""
    order: list[str] = []
    begun: set[str] = set()

    def visit(module: str) -> None:
        if module not in begun:
            begun.add(module)
            for target in sorted(edges[module], reverse=True):
                visit(target)
            order.append(module)

    for module in sorted(edges, reverse=True):
        visit(module)
    return order[::-1]


def _row(text: str) -> str:
    return f"│ {_cut(text, WIDTH - 4):{WIDTH - 4}} │"


def _cut(text: str, width: int) -> str:
    """A text of at most `width` characters, cut between words."""
    return text if len(text) <= width else f"{text[: width - 1].rpartition(' ')[0]} …"


def _summary(path: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main() -> None:
    """Write the picture into CONTRIBUTING.md."""
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text(f"{head}{BEGIN}{draw()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
