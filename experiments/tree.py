"""The file tree of README.md from module docstrings, one line a file: `python experiments/tree.py`, with --write into README.md."""

import ast
from pathlib import Path

from mtl.errors import UserError
from mtl.runtime import process

ROOT = Path(__file__).parent.parent
FOLDERS = ("mtl", "sharding_rules", "experiments")
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"


def main() -> None:
    """Print the tree, or with --write replace the part of README.md between the two markers."""
    arguments = process.command_line()
    if arguments not in ([], ["--write"]):
        raise UserError(f"experiments/tree.py got {' '.join(arguments)!r}: expected nothing, or --write.")
    drawn = draw(ROOT)
    if not arguments:
        print(drawn)
        return
    readme = ROOT / "README.md"
    readme.write_text(spliced(readme.read_text(), drawn))


def draw(root: Path) -> str:
    """Draw the packages under ``root``: every folder and file with the first line of its docstring."""
    rows = [row for name in FOLDERS for row in _rows(root / name, 0)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {line}".rstrip() for name, line in rows)


def spliced(text: str, drawn: str) -> str:
    """Give ``text`` with what stands between the markers replaced by the tree, as a fenced block."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"README.md must hold the markers {BEGIN} and {END} once each, in this order.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n```text\n{drawn}\n```\n{END}{rest.split(END)[1]}"


def _rows(folder: Path, depth: int) -> list[tuple[str, str]]:
    rows = [("  " * depth + f"{folder.name}/", _first_line(folder / "__init__.py"))]
    inner = "  " * (depth + 1)
    rows += [(inner + path.name, _first_line(path)) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            rows += _rows(path, depth + 1)
    return rows


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    process.guarded(main)
