"""The house rules, held by reading the source: levels, what __init__ holds, where the environment is read, what is banned."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for top in ("mtl", "sharding_rules", "experiments") for p in (ROOT / top).rglob("*.py"))
LEVELS = {
    **dict.fromkeys(("mtl.axes", "mtl.tree", "mtl.precision", "mtl.random", "mtl.errors"), 0),
    **dict.fromkeys(("mtl.sharding", "mtl.kernels", "mtl.runtime"), 1),
    **dict.fromkeys(("mtl.ops", "mtl.params"), 2),
    **dict.fromkeys(("mtl.models", "mtl.optim", "mtl.data", "mtl.checkpoint", "mtl.pipeline", "mtl.eval", "mtl.inspect"), 3),
    "mtl.lora": 3.5,
    "mtl.train": 4,
    "mtl.generate": 4.5,
    "sharding_rules": 1.5,
    "experiments": 5,
    "mtl.cli": 6,
    "mtl": -1,
}


def unit(module: str) -> str:
    """Name the part of the house a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] in ("sharding_rules", "experiments") or len(parts) == 1 else ".".join(parts[:2])


def imports(path: Path) -> list[tuple[int, str]]:
    """List (line, module) of what a file imports from this project."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, submodule(node.module, a.name)) for a in node.names]
    return [(line, m) for line, m in found if m.split(".")[0] in ("mtl", "sharding_rules", "experiments", "tests")]


def submodule(package: str, name: str) -> str:
    """Say what ``from package import name`` needs: a module of that name, or the package itself."""
    inner = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if package == "mtl" or inner.is_dir() or inner.with_suffix(".py").exists() else package


def module_of(path: Path) -> str:
    """Name a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    own = unit(module_of(path))
    for line, target in imports(path):
        other = unit("mtl" if target == "mtl.__version__" else target)
        assert other in LEVELS, f"{path}:{line}: {target} has no level"
        assert other == own or LEVELS[other] < LEVELS[own], f"{path}:{line}: level {LEVELS[own]} imports {target} of level {LEVELS[other]}"


def test_no_cycles_between_modules() -> None:
    graph = {module_of(p): {m for _, m in imports(p)} for p in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=module_of)
def test_init_files_only_reexport(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_name = isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id in ("__all__", "__version__") for t in node.targets)
        assert is_text or is_name or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}"


def test_environment_is_read_in_runtime_alone() -> None:
    for path in FILES:
        if "runtime" not in path.parts:
            assert not re.search(r"os\.environ|os\.getenv", path.read_text()), path


def test_torch_compile_is_called_once() -> None:
    calls = [p for p in FILES if re.search(r"torch\.compile\(", re.sub(r'""".*?"""', "", p.read_text(), flags=re.S))]
    assert [module_of(p) for p in calls] == ["mtl.runtime.compile"]


def test_nothing_unsafe() -> None:
    bad = re.compile(r"\b(pickle|marshal|dill)\b|torch\.load|\beval\(|\bexec\(|shell=True|allow_pickle=True|trust_remote_code")
    for path in FILES:
        assert not bad.search(path.read_text()), path


def test_files_and_functions_are_short() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 420, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if "kernels" in path.parts else 60
                assert (node.end_lineno or 0) - node.lineno < limit, f"{path}:{node.lineno} {node.name}"


def test_the_step_is_short() -> None:
    source = ast.parse((ROOT / "mtl/train/step.py").read_text())
    steps = [n for n in ast.walk(source) if isinstance(n, ast.FunctionDef) and n.name in ("train_step", "make_step")]
    assert len(steps) == 2
    for node in steps:
        assert (node.end_lineno or 0) - node.lineno < 30


def test_no_file_is_named_for_nothing() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc", "manager")]


def test_models_name_no_mesh_axis() -> None:
    """A model knows logical axes alone."""
    for path in (ROOT / "mtl/models").glob("*.py"):
        for axis in ("replica", "fsdp", "context"):
            assert f'"{axis}"' not in path.read_text(), f"{path} names mesh axis {axis}"


def test_every_public_function_has_a_docstring() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{path} has no module docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"
