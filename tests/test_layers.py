"""Which module may import which, as CONTRIBUTING.md draws it, and the other rules of the layout."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPT_FOLDERS = ("recipes", "eval", "data", "benchmarks")
LIBRARY = sorted((ROOT / "alignment").glob("*.py"))
SCRIPTS = sorted(path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("*.py"))
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"}
# Help, a wrong flag and a comparison go through these, and must not wait seconds for a framework.
LIGHT = {"options", "rows", "results", "errors"}


def drawing(text):
    """Read the block of CONTRIBUTING.md: {group: modules}, {group: groups it may import}."""
    block = re.search(r"```imports\n(.*?)```", text, re.S).group(1)
    groups, arrows = {}, {}
    for line in block.splitlines():
        name, modules, targets = re.fullmatch(r"(\w+): ([\w ]+?) *(?:-> ([\w ]+))?", line).groups()
        groups[name], arrows[name] = modules.split(), (targets or "").split()
    return groups, arrows


GROUPS, ARROWS = drawing((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
GROUP_OF = {module: group for group, modules in GROUPS.items() for module in modules}


def read(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree):
    """Every imported module as a dotted name, in functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name, alignment.x"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree):
    """The modules of alignment that a tree imports, without the package's name."""
    found = {name.split(".")[1] for name in imports(tree) if name.startswith("alignment.")}
    return found & {path.stem for path in LIBRARY}


def at_import(tree):
    """First parts of what a tree imports when it is imported itself: outside functions and TYPE_CHECKING."""
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in imports(ast.Module(top, []))}


def undrawn(module, tree):
    """The imports of a module of ours for which there is no arrow."""
    allowed = {GROUP_OF[module], *ARROWS[GROUP_OF[module]]}
    return sorted(name for name in ours(tree) if GROUP_OF[name] not in allowed)


def catches_all(tree):
    """Lines that catch any Exception."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id if isinstance(kind, ast.Name) else kind for kind in kinds}
            # BaseException is for tidying up, when it goes on; a bare except is neither.
            goes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if names & {"Exception", None} or ("BaseException" in names and not goes_on):
                yield node.lineno


def guesses(tree):
    """Lines with getattr and a default."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 2:
            yield node.lineno


def bare_functions(tree):
    """Public functions and methods without docstring or annotations.

    A method that has a base class's signature does not repeat its types.
    """
    for node in tree.body:
        inherits = isinstance(node, ast.ClassDef) and bool(node.bases)
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in members:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            asked = function.args
            named = [*asked.posonlyargs, *asked.args, *asked.kwonlyargs]
            typed = function.returns and all(arg.annotation or arg.arg in ("self", "cls") for arg in named)
            if not ast.get_docstring(function) or not (typed or inherits):
                yield f"{function.name} (line {function.lineno})"


def relative(path):
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(LIBRARY) > 25
    assert {"recipes", "eval", "data"} <= {path.parent.name for path in SCRIPTS}
    assert not (ROOT / "alignment" / "utils.py").exists()
    assert not list(ROOT.glob("recipes/**/__init__.py")), "recipes are launched, never imported"


def test_drawing_shows_every_module_once():
    drawn = [module for modules in GROUPS.values() for module in modules]
    assert sorted(drawn) == [path.stem for path in LIBRARY if path.stem != "__init__"], (
        "put the module into a group of the drawing in CONTRIBUTING.md"
    )


def test_arrows_of_the_drawing_point_down_and_are_in_use():
    order = list(GROUPS)
    for group, targets in ARROWS.items():
        assert all(order.index(target) > order.index(group) for target in targets), group
        used = {GROUP_OF[name] for module in GROUPS[group] for name in ours(read_module(module))}
        assert used >= set(targets), f"nothing in {group} imports {set(targets) - used}: erase the arrow"


def read_module(name):
    return read(ROOT / "alignment" / f"{name}.py")


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_module_imports_what_is_drawn(path):
    if path.stem != "__init__":
        assert not undrawn(path.stem, read(path)), "no such arrow in CONTRIBUTING.md"
    for name in imports(read(path)):
        assert name.split(".")[0] not in {*SCRIPT_FOLDERS, "tests"}


def test_no_import_cycle():
    graph = {path.stem: ours(read(path)) - {path.stem} for path in LIBRARY}
    assert sum(map(len, graph.values())) > 30
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [name for group in LIGHT for name in GROUPS[group]])
def test_light_module_imports_no_framework(module):
    assert not at_import(read_module(module)) & HEAVY, "import it inside the function that needs it"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_do_not_import_scripts(path):
    forbidden = {script.stem for script in SCRIPTS} | set(SCRIPT_FOLDERS)
    assert not {name.split(".")[0] for name in imports(read(path))} & forbidden


def test_no_script_has_the_name_of_a_module():
    """Python puts a script's folder first on its path: recipes/evaluate.py would be `import evaluate`."""
    code = "import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"
    command = [sys.executable, "-I", "-c", code]
    names = [path.stem for path in SCRIPTS]
    found = subprocess.run([*command, *names, "evaluate"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["evaluate"]


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=relative)
def test_source_keeps_the_rules(path):
    tree = read(path)
    assert not list(catches_all(tree)), "catch what can happen, not everything"
    assert not list(guesses(tree)), "a silent default hides a misspelling"
    limit = {"recipes": 100, "alignment": 400}.get(path.parent.name)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert limit is None or lines <= limit, f"{lines} lines of {limit}"
    if path in LIBRARY:
        assert ast.get_docstring(tree), "say what the module is for"
        assert not list(bare_functions(tree)), "annotate it and say what it does"


def test_checks_find_what_they_look_for():
    bad = ast.parse(
        "import torch\n"
        "def loose(x): return getattr(x, 'a', None)\n"
        "try: pass\nexcept (ValueError, Exception): pass\n"
        "try: pass\nexcept BaseException: pass\n"
        "def late():\n    'Doc.'\n    from alignment import config\n    import alignment.models\n"
    )
    assert undrawn("errors", bad) == ["config", "models"]
    assert undrawn("models", bad) == []
    assert at_import(bad) == {"torch"}
    assert len(list(catches_all(bad))) == 2
    assert len(list(guesses(bad))) == 1
    assert [name.split()[0] for name in bare_functions(bad)] == ["loose", "late"]
    fine = ast.parse(
        "try: pass\nexcept BaseException:\n    raise\n"
        "def told(x: int, *rest) -> int:\n    'Doc.'\n    return getattr(x, 'real')\n"
        "class C(B):\n    def on_save(self, args):\n        'Doc.'\n"
    )
    assert not [*catches_all(fine), *guesses(fine), *bare_functions(fine)]
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
