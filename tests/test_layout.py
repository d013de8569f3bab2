"""Imports run one way: scripts, run_squad, trainer_qa, then utils_qa and qa/; and in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from a level further down, or, on the highest and the lowest one, from a module beside it.
LEVELS = {"scripts": 0, "run_squad": 1, "trainer_qa": 2, "utils_qa": 3, "qa": 3}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(ROOT / "qa").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(source: str) -> set[str]:
    """The modules that the source imports, at its top and within functions; `from a import b` may mean `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str, source: str, known: set[str]) -> set[str]:
    return (imports(source) & known) - {name, "qa"}


def level(module: str) -> int:
    return LEVELS[module.partition(".")[0]]


def test_the_top_level_is_what_users_know():
    assert {file.stem for file in ROOT.glob("*.py")} == {"run_squad", "trainer_qa", "utils_qa"}


def test_no_import_runs_up():
    found = modules()
    for name, file in found.items():
        for imported in own_imports(name, file.read_text(encoding="utf-8"), found.keys()):
            assert level(imported) > level(name) or level(imported) == level(name) in (0, 3), (name, imported)


def test_no_import_runs_in_a_circle():
    found = modules()
    graph = {name: own_imports(name, file.read_text(encoding="utf-8"), found.keys()) for name, file in found.items()}
    assert graph["run_squad"] and graph["qa.load_model"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_model_file_needs_nothing_of_this_repository():
    file = ROOT / "qa" / "modeling_relative_bert.py"
    assert not own_imports("qa.modeling_relative_bert", file.read_text(encoding="utf-8"), modules().keys())


@pytest.mark.parametrize(
    "source",
    ["import run_squad", "from qa import hub", "def f():\n    from qa.hub import loading", "import qa.hub as h"],
)
def test_imports_are_seen_wherever_they_stand(source):
    assert own_imports("somewhere", source, modules().keys()) & {"run_squad", "qa.hub"}
