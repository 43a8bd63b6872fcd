"""The import rules: scripts import to the left only, support/ imports no script, preprocess.py needs no torch."""

import ast

from helpers import PROGRAMS, ROOT, run_python

SCRIPTS = ["preprocess", "dataloader", "network", "network_128", "generator", "evaluate", "train"]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_run_one_way():
    """A script imports only the scripts to its left in SCRIPTS. support/ imports no script."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    for place, name in enumerate(SCRIPTS):
        for module in set(imported_modules(ROOT / f"{name}.py")) & set(SCRIPTS):
            assert SCRIPTS.index(module) < place, f"{name}.py imports {module}"
    for path in (ROOT / "support").glob("*.py"):
        assert not set(imported_modules(path)) & set(SCRIPTS), path


def test_import_of_preprocess_does_not_import_torch(tmp_path):
    """A worker process then starts in a tenth of a second, and not in two."""
    assert run_python(PROGRAMS / "import_preprocess.py", cwd=tmp_path).returncode == 0


def test_float64_is_made_on_the_cpu():
    """MPS has no float64. Only metrics.py, which is given a device that has it, computes in it there."""
    paths = [path for path in (*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")) if path.name != "metrics.py"]
    found = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "double":
                before = node.value
                found += 1
                assert ast.unparse(before).endswith(".cpu()"), f"{path.name}, line {node.lineno}"
    assert found
