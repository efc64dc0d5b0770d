"""The project itself: who imports whom, what must not be there, and that its commands, names and files agree."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dino_simpool
from dino_simpool import cli
from dino_simpool.submit import jobs_of

PACKAGE = Path(dino_simpool.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Every module of the package by its dotted name."""

LEVELS = (
    {"config", "distributed", "signals", "pictures", "files", "names", "failures"},
    {"logs", "paths"},
    {"data", "models", "synthetic", "lock"},
    {"checkpoint", "dino", "layouts", "results", "timm_models"},
    {"features"},
    {"eval", "check_data", "learners"},
    {"train", "report", "bench", "convert", "hub"},
    {"cli"},
    {"submit"},
    {"__main__"},
)
"""Modules and packages at the root: each imports from lower levels and from itself."""


def level_of(module: str) -> int:
    """The level of a module, by the first part of its name."""
    return next(number for number, names in enumerate(LEVELS) if module.partition(".")[0] in names)


def imports(source: str) -> set[str]:
    """What a module imports of ours, at its top or inside a function: modules without the name of the package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "dino_simpool" else [str(node.module)]
            )
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.removeprefix("dino_simpool.") for name in names if name.partition(".")[0] == "dino_simpool"}
    return {name for name in found if not name.startswith("__")}


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports but must not. Of the evaluators, train takes k-NN only."""
    own = module.removeprefix("dino_simpool.").partition(".")[0]
    refused = {name for name in imported if name.partition(".")[0] != own and level_of(name) >= level_of(own)}
    if own == "train":
        refused |= {name for name in imported if name.partition(".")[0] == "eval" and name != "eval.knn"}
    return [f"{module} imports {name}" for name in sorted(refused)]


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "dino_simpool"])
def test_imports_go_downwards(module: str) -> None:
    assert violations(module, imports(SOURCES[module].read_text())) == []


def test_every_module_has_one_level() -> None:
    names = [name for level in LEVELS for name in level]
    roots = {name.split(".")[1] for name in SOURCES if "." in name}
    assert sorted(names) == sorted(roots)


def test_the_search_for_imports_finds_them() -> None:
    source = (
        "import dino_simpool.train\nfrom dino_simpool import __version__, dino\nimport torch\n"
        "def f():\n    from dino_simpool.eval.knn import knn_rank\n"
    )
    assert imports(source) == {"train", "dino", "eval.knn"}
    assert violations("dino_simpool.eval.linear", {"train", "eval.knn", "check_data", "features"}) == [
        "dino_simpool.eval.linear imports check_data",
        "dino_simpool.eval.linear imports train",
    ]
    assert violations("dino_simpool.train", {"eval.knn", "eval.linear", "report", "dino.plan"}) == [
        "dino_simpool.train imports eval.linear",
        "dino_simpool.train imports report",
    ]


def test_the_command_line_names_modules_that_exist_and_the_options_that_they_take() -> None:
    """They are imported by name, so that help needs no torch, and no checker sees it."""
    for name, (kind, action, text) in cli.COMMANDS.items():
        module, function = action.split(":")
        body = ast.parse(SOURCES[f"dino_simpool.{module}"].read_text()).body
        found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == function]
        assert found, f"{name}: there is no {action}"
        [argument] = found[0].args.args
        assert argument.annotation is not None and ast.unparse(argument.annotation) == kind.__name__ and text


def test_the_light_modules_import_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, dino_simpool\n"
        "from dino_simpool import cli, config, synthetic\n"
        "from dino_simpool.dino import plan\n"
        "assert dino_simpool.__version__ and 'SimPool' in dino_simpool.__all__\n"
        "heavy = {'torch', 'torchvision', 'timm', 'faiss'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_found_when_asked_for() -> None:
    for name in dino_simpool.__all__:
        found = getattr(dino_simpool, name)
        assert found is getattr(importlib.import_module(found.__module__), name) and found.__module__.startswith(
            "dino_simpool."
        )
    with pytest.raises(AttributeError, match="no attribute Simpool; public names: "):
        _ = dino_simpool.Simpool


# -- what must not be there


def test_no_module_for_odds_and_ends() -> None:
    stems = {path.stem for path, _ in texts()}
    assert not stems & {"utils", "util", "misc", "helpers", "common"}


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project."""
    suffixes = (".py", ".md", ".yaml", ".cfg", ".toml", ".sh", ".sbatch")
    for pattern in ("*", "dino_simpool/**/*", "configs/*", "eval/*", "examples/*", "tests/**/*", "launch/*", ".ci/*"):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and (path.suffix in suffixes or path.name in ("Makefile", "run", ".gitignore")):
                yield path, path.read_text()


def test_no_path_hacks_and_no_paths_of_one_machine() -> None:
    folders = "|".join(("work", "home", "root", "Users", "mnt", "scratch", "tmp", "gpfs", "opt"))
    machine_path = re.compile(rf"""(?<![\w.}}$)])/(?:{folders})/\w""")
    assert machine_path.search('"/' + 'home/me/data"') and not machine_path.search(
        "https://a.org/work/x, data/work/x, $OUT/tmp/x"
    )
    hack = "sys." + "path"
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if machine_path.search(line) or (hack in line and path.suffix == ".py")
    ]
    assert found == []


def test_nothing_is_left_open() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "Not" + "ImplementedError")))
    assert [str(path.relative_to(ROOT)) for path, text in texts() if path.suffix == ".py" and marks.search(text)] == []


# -- documentation and types in the code


def public_functions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions of a module and methods of its public classes; what Python calls itself (__init__) included."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (node.name.startswith("__") or not node.name.startswith("_")):
            yield owner + node.name, node


def undocumented(body: list[ast.stmt]) -> list[str]:
    named_by_torch = ("forward", "backward", "extra_repr")  # their class says what they do
    found = [(name, f) for name, f in public_functions(body) if not f.name.startswith("__") and not ast.get_docstring(f)]
    return [name for name, f in found if "." not in name or f.name not in named_by_torch]


def untyped(body: list[ast.stmt]) -> list[str]:
    found = []
    for name, f in public_functions(body):
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
        first = arguments[0].arg if arguments else ""
        missing = [a.arg for a in arguments if a.annotation is None and not (a is arguments[0] and first in ("self", "cls"))]
        if missing or (f.returns is None and f.name != "__init__"):
            found.append(f"{name}: {', '.join(missing) or 'what it returns'}")
    return found


def test_the_search_for_undocumented_and_untyped_functions_finds_them() -> None:
    source = (
        "class A:\n"
        "    def f(self, x) -> int:\n"
        "        'Text.'\n"
        "    def __init__(self, y: int): pass\n"
        "    def _h(z): pass\n"
        "def g(x: int): pass\n"
    )
    body = ast.parse(source).body
    assert undocumented(body) == ["g"] and untyped(body) == ["A.f: x", "g: what it returns"]


@pytest.mark.parametrize("module", SOURCES)
def test_public_functions_are_documented_and_typed(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text())
    assert ast.get_docstring(tree), "what is in this module?"
    classes = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert (undocumented(tree.body), untyped(tree.body), classes) == ([], [], [])


def wide_texts(source: str) -> list[int]:
    """Numbers of the lines of docstrings and comments that have more than 100 columns."""
    lines = source.splitlines()
    texts = {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sorted(number for number in texts if len(lines[number - 1]) > 100)


def test_the_search_for_wide_texts_finds_them() -> None:
    long = "x" * 100
    assert wide_texts(f'"""{long}"""\n# {long}\nname = "{long}"\n# short\n') == [1, 2]


@pytest.mark.parametrize("module", SOURCES)
def test_docstrings_and_comments_wrap_at_100_columns(module: str) -> None:
    assert wide_texts(SOURCES[module].read_text()) == []


# -- commands, names and files that must agree


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def recipe_lines(target: str) -> list[str]:
    """The commands of a target of the Makefile, with continued lines joined and its variables put in."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+) \??= (.*)$", text, re.MULTILINE))
    body = text.partition(f"\n{target}:")[2].partition("\n")[2].split("\n\n")[0]
    for _ in variables:  # a variable may hold another
        body = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], body)
    return [" ".join(line.split()) for line in body.splitlines() if line.startswith("\t")]


def shown_commands(path: Path) -> list[str]:
    """Lines of the code blocks of a page, without comments, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_readme_ci_and_makefile_name_the_same_commands() -> None:
    targets = make_targets()
    readme = [line for line in shown_commands(ROOT / "README.md") if line.startswith("make ")]
    assert readme[:2] == ["make quickstart", "make test"], "the page opens with them"
    ci = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert "make test" in ci and os.access(ROOT / ".ci" / "run", os.X_OK)
    contributing = re.findall(r"`(make [\w-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert {f"make {target}" for target in targets} >= {*readme, *ci, *contributing}
    assert {"make quickstart", "make test", "make check"} <= set(contributing)
    checked = re.search(r"^check: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert checked and [f"make {target}" for target in checked[1].split()] == ci, "CI runs what `make check` runs"
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and set(phony[1].split()) == targets


def our_commands() -> Iterator[tuple[str, list[str]]]:
    """(where, arguments of dino-simpool) of every command shown to a user or run by make."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/cluster.md")]
    lines = [(page.name, line) for page in pages for line in shown_commands(page)]
    lines += [("make quickstart", line) for line in recipe_lines("quickstart")]
    lines += [("--help", line) for line in cli.EXAMPLES.splitlines()]
    for where, line in lines:
        if match := re.search(r"(?:^|/|^srun |\s{2})dino-simpool (.*)|-m dino_simpool (.*)", line):
            yield where, shlex.split(match[1] or match[2])


def test_every_command_that_is_shown_is_understood() -> None:
    seen = set()
    for where, (name, *options) in our_commands():
        if any("..." in option for option in options) or "--help" in options:
            continue
        if options and f"{name} {options[0]}" in cli.COMMANDS:
            name, options = f"{name} {options[0]}", options[1:]
        seen.add((where, name))
        cfg: Any = cli.read(name, options)  # ConfigError if anything in it is wrong
        if name == "submit":
            jobs_of(cfg)
    for where, names in {
        "make quickstart": {"synthetic", "train", "knn", "masks", "report"},
        "README.md": {"train", "knn", "linear"},
        "cluster.md": {"submit", "report", "check-data"},
    }.items():
        assert names <= {name for place, name in seen if place == where}


def test_quickstart_trains_and_evaluates_what_it_makes() -> None:
    lines = [line for line in recipe_lines("quickstart") if "dino-simpool" in line]
    assert [line.split()[1] for line in lines][:2] == ["synthetic", "train"] and lines[-1].split()[1] == "report"
    assert "--out runs/quickstart " in lines[-1] + " " and "--run.out runs/quickstart " in lines[1]


def test_files_that_the_pages_name_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/cluster.md"):
        text = (ROOT / page).read_text()
        named = set(re.findall(r"`((?:dino_simpool|tests|configs|eval|examples|launch)/[\w/.]*)[` ]", text))
        missing = [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()]
        assert named and missing == [], page


def test_readme_tour_names_every_module() -> None:
    text = (ROOT / "README.md").read_text().partition("## Reading the code")[2].partition("\n## ")[0]
    modules = {name.split(".")[1] for name in SOURCES if "." in name} - {"__main__"}
    missing = {name for name in modules if f"{name}.py" not in text and f"{name}/" not in text}
    assert missing == set()


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_an_installation_has_all_packages_and_the_recipes() -> None:
    options = setup()["options"]
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert set(options["packages"].split()) == folders | {"dino_simpool.configs"}
    assert "dino_simpool.configs = configs" in options["package_dir"]
    assert setup()["options.package_data"]["dino_simpool.configs"] == "*.yaml"
    assert list((ROOT / "configs").glob("*.yaml"))


def test_an_installed_recipe_is_found_by_name(tmp_path: Path) -> None:
    """Beside the modules, as setuptools puts them, and without the project around them."""
    site = tmp_path / "site"
    for path in PACKAGE.rglob("*.py"):
        if path.parent in (PACKAGE, PACKAGE / "config"):
            target = site / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (site / "dino_simpool" / "configs").mkdir()
    (site / "dino_simpool" / "configs" / "mine.yaml").write_text("run: {seed: 41}\n")
    command = [sys.executable, "-m", "dino_simpool", "train", "--config", "mine", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0 and "seed: 41" in done.stdout, done.stderr


def test_dependencies_are_what_is_imported() -> None:
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "faiss": "faiss-cpu", "cv2": "opencv-python-headless",
                         "huggingface_hub": "huggingface-hub"}  # fmt: skip
    imported = set()
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    needed = {distributions.get(name, name) for name in imported - sys.stdlib_module_names - {"dino_simpool"}}
    declared = {re.split(r"[<>=]", line)[0] for line in setup()["options"]["install_requires"].split()}
    # docstring-parser: of jsonargparse, for the strings under the options. tensorboard: of torch.utils.tensorboard.
    # torchvision: of timm, and its version must fit torch's.
    optional = {"pyarrow", "onnxruntime"}  # imported where it is used, by an option that says how to install it
    assert all(
        f"{name}>=" in setup()["options.extras_require"]["parquet" if name == "pyarrow" else "onnx"] for name in optional
    )
    assert needed - declared == optional and declared - needed <= {"docstring-parser", "tensorboard", "torchvision"}


def test_every_dependency_has_a_lowest_version_that_make_test_oldest_takes() -> None:
    """It reads `NAME>=VERSION` with sed, so nothing may be written in another way. The tools of `make lint` are pinned."""
    declared, dev = (setup()[section][key].split("\n") for section, key in
                     (("options", "install_requires"), ("options.extras_require", "dev")))  # fmt: skip
    lowest = r"[a-z][\w-]*>=\d[\w.]*"
    assert [line for line in declared if line and not re.fullmatch(lowest, line)] == []
    assert [line for line in dev if line and not re.fullmatch(rf"{lowest}|[\w-]+==\d[\w.]*", line)] == []


def test_the_lowest_python_is_the_same_everywhere() -> None:
    makefile, text = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    lowest = setup()["options"]["python_requires"].removeprefix(">=")
    assert setup()["metadata"]["classifiers"].split("\n")[1].endswith(f":: {lowest}")
    assert f"OLDEST_PYTHON ?= python{lowest}\n" in makefile and f'python_version = "{lowest}"' in text
    assert f'target-version = "py{lowest.replace(".", "")}"' in text
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {lowest} " in (ROOT / page).read_text(), page


def test_version_and_changelog_agree() -> None:
    assert re.search(rf"^## \[?{re.escape(dino_simpool.__version__)}\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert setup()["metadata"]["version"] == "attr: dino_simpool.__version__"
