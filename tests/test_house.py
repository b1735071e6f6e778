"The rules of the house: one direction of imports, one notebook a module, phase notebooks without logic."

import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from elson_nb.recipes import RECIPES, load_recipe, save_recipe

ROOT = Path(__file__).parents[1]
PACKAGE, NBS = ROOT / "elson_nb", ROOT / "nbs"
WINGS = ("recipes", "store", "corpus", "curriculum", "training", "evaluation", "release", "session", "cli")
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PHASE_NOTEBOOKS = [p for p in NOTEBOOKS if p.parent in (NBS / "phases", NBS / "reports")]
RECIPE_FILES = sorted(RECIPES.glob("*.yaml"))
HOME = re.compile(r"(?<![\w.])/(?:home|Users)/\w|(?<![\w.])/root/|\b[A-Za-z]:\\+Users\\+")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_of(notebook: Path) -> list[dict]:
    return [c for c in cells_of(notebook) if c["cell_type"] == "code"]


def parse(cell: dict) -> ast.Module:
    "The syntax tree of a code cell; magics become calls, as they do when it runs."
    return ast.parse(TransformerManager().transform_cell("".join(cell["source"])))


def imported(module: Path) -> set[str]:
    "Dotted names below elson_nb that a module imports, anywhere in it."
    package = ("elson_nb", *module.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return {name.removeprefix("elson_nb.") for name in found if name.startswith("elson_nb.")}


def test_the_tree_was_found():
    assert MODULES and NOTEBOOKS and RECIPE_FILES


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_module_imports_a_wing_to_its_right(module):
    own = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in WINGS, f"{name_of(module)}: no wing is called '{own}'; give it its place in WINGS"
    wings = {name: name.split(".")[0] for name in imported(module)}
    upward = [name for name, wing in wings.items() if wing in WINGS and WINGS.index(wing) > WINGS.index(own)]
    assert not upward, f"{name_of(module)} imports {upward}, to the right of '{own}'"


def exports(notebook: Path) -> set[str]:
    "Modules a notebook writes: its `default_exp`, and any named by a single export."
    text = "\n".join("".join(c["source"]) for c in code_of(notebook))
    return set(re.findall(r"^\s*#\s*\|\s*(?:default_exp|exports?)[ \t]+([\w.]+)", text, re.M))


def test_no_two_notebooks_export_the_same_module():
    counts = Counter(module for notebook in NOTEBOOKS for module in exports(notebook))
    assert counts, "no notebook exports anything"
    assert not [module for module, n in counts.items() if n > 1]


def test_every_library_notebook_exports_one_module():
    library = [p for p in NOTEBOOKS if p.parent.name not in ("phases", "reports", "explore")]
    assert {name_of(p): sorted(exports(p)) for p in library if len(exports(p)) != 1} == {}


@pytest.mark.parametrize("notebook", PHASE_NOTEBOOKS, ids=name_of)
def test_phase_notebook_holds_no_logic(notebook):
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = (node for cell in code_of(notebook) for node in ast.walk(parse(cell)))
    defined = [node.name for node in nodes if isinstance(node, logic)]
    assert not defined, f"{name_of(notebook)} defines {defined}; move them to a library notebook"


@pytest.mark.parametrize("notebook", PHASE_NOTEBOOKS, ids=name_of)
def test_phase_notebook_has_one_cell_of_literal_parameters(notebook):
    tagged = [c for c in cells_of(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
    statements = parse(tagged[0]).body
    assert 0 < len(statements) < 10
    for statement in statements:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), f"no assignment: {ast.unparse(statement)}"
        try:
            ast.literal_eval(statement.value)
        except (ValueError, TypeError):
            pytest.fail(f"no literal, so an override would leave it stale: {ast.unparse(statement)}")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_is_clean(notebook):
    assert notebook.stat().st_size < 2**20, "1 MB or more; smaller figures, fewer outputs"
    for cell in code_of(notebook):
        counts = [cell["execution_count"], *(o.get("execution_count") for o in cell["outputs"])]
        assert not any(c is not None for c in counts), "execution counts; run make sync"
    text = notebook.read_text(encoding="utf-8")
    places = [*HOME.finditer(text), *re.finditer(rf"(?<![\w.~-]){re.escape(str(ROOT))}/", text)]
    assert not places, f"an absolute path of one machine: …{text[places[0].start() :][:60]}…"


@pytest.mark.parametrize("path", RECIPE_FILES, ids=name_of)
def test_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path) and recipe.name == path.stem and recipe.purpose
    save_recipe(recipe, tmp_path / path.name)
    assert load_recipe(tmp_path / path.name).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("path", RECIPE_FILES, ids=name_of)
def test_recipe_begins_with_the_command_that_runs_it(path):
    head = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))[0]
    assert re.search(rf"elson run --recipe {re.escape(path.stem)}\b(?!-)", head)
