"""The package as a user gets it: the wheel, the command, the documentation, and the rules of the repository."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
import zipfile
from pathlib import Path

import pytest
import yaml

import recbole_gr2
from recbole_gr2.config import properties_folder

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "recbole_gr2", "properties")
PAGES = [file for pattern in ("*.md", "docs/*.md", "results/*.md") for file in sorted(ROOT.glob(pattern))]
OLD_NAMES = ("CHANGELOG.md", "migration.md")  # pages that quote former names; so do the reports in results/


def run(command, cwd, **environment):
    """Run a command without the checkout on the path. Returns the finished process."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**plain, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


# --- wheel and command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel. It is built from a copy, so that an old build folder cannot add files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source], cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Python of a new virtual environment with the wheel and the dependencies of the running environment.

    A .pth file adds the dependencies. It puts them after the wheel on the path and does not follow an editable install.
    """
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], cwd=folder)
    return python


@pytest.mark.slow
@pytest.mark.packaging
def test_wheel_contains_every_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(f.relative_to(ROOT)) for f in (ROOT / "recbole_gr2").rglob("*.py")}
    properties = {f"recbole_gr2/{f.relative_to(ROOT)}" for f in (ROOT / "properties").rglob("*") if f.is_file()}
    assert len(modules) > 30 and len(properties) > 15  # the globs are not empty
    templates = {str(f.relative_to(ROOT)) for f in (ROOT / "recbole_gr2" / "report" / "templates").iterdir()}
    expected = modules | properties | templates | {"recbole_gr2/py.typed"}
    assert len(templates) > 2 and {f for f in packed if ".dist-info/" not in f} == expected


@pytest.mark.slow
@pytest.mark.packaging
def test_installed_command_plans_a_run(clean, tmp_path):
    where = run([clean, "-c", "import recbole_gr2.config as c; print(c.__file__, c.properties_folder())"], cwd=tmp_path)
    assert [str(ROOT) in path for path in where.stdout.split()] == [False, False]
    done = run([clean.with_name("recbole-gr2"), "--dry_run", "--preset", "smoke"], cwd=tmp_path, OMP_NUM_THREADS="1")
    plan = [
        line.split()[0] for line in done.stderr.splitlines() if line.split()[2:] == ["run", "unknown", "first", "time"]
    ]
    documented = [name for name in stages_of_usage() if name in plan]
    assert [name for name in plan if name in documented] == documented and len(documented) >= 9
    assert plan[-1] == "evaluate"
    assert not (tmp_path / "saved").exists()


def test_help_imports_no_large_library():
    code = (
        "import sys; from recbole_gr2.quick_start import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "large = {'torch', 'transformers', 'trl', 'recbole', 'pandas'}\n"
        "print(sorted(large & {name.split('.')[0] for name in sys.modules}))"
    )
    done = run([sys.executable, "-c", code], cwd=ROOT)
    assert "--dry_run" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_every_requirement_has_one_tested_version():
    """constraints.txt pins each package of setup.cfg once, and no local build. vLLM needs other ones (docs/gpu.md)."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 50 and all(re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(set(names)) == len(names)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    blocks = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    required = {re.match(r"[a-z0-9-]+", line).group() for line in "\n".join(blocks).splitlines() if line.strip(" #")}
    assert len(required) > 25
    assert required - set(names) - {"recbole-gr2", "setuptools", "vllm"} == set()


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == recbole_gr2.__version__ and len(citation["references"]) == 2


# --- README, docs and .ci/run ----------------------------------------------------------------------------------------


def marked_line(name):
    """The one command of the README's fenced block after a mark."""
    (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (line,) = block.splitlines()
    return line


@pytest.mark.parametrize("name, last", [("run", "python run_recbole_gr2.py"), ("test", "python -m pytest -n 2")])
def test_readme_lines_are_complete(name, last):
    steps = marked_line(f"set-up-and-{name}").split(" && ")
    assert "-m venv" in steps[0] and steps[-1].startswith(last)
    assert any(step.startswith("pip install -c constraints.txt -e ") for step in steps)


CHECKS = ("ruff format --check .", "ruff check .", "lint-imports --no-logo", "mypy", "make site")


@pytest.mark.parametrize(
    "line, failing, code, steps",
    [
        ("echo set up && echo tested", "", 0, ["echo set up", *CHECKS, "echo tested"]),
        ("true && false && echo tested", "", 1, ["true && false"]),
        ("echo set up && false", "", 1, ["echo set up", *CHECKS, "false"]),
        ("echo set up && echo tested", "mypy", 1, ["echo set up", *CHECKS[:-1]]),
        ("echo set up && echo tested", "make", 1, ["echo set up", *CHECKS]),
        ("echo set up && echo tested", "ruff", 1, ["echo set up", CHECKS[0]]),
        ("", "", 1, []),
    ],
)
def test_ci_runs_the_checks_before_the_tests(tmp_path, line, failing, code, steps):
    """Each step of the README's line and each check has to succeed. The tests come last."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    readme = f"<!-- set-up-and-test -->\n```bash\n{line}\n```\n" if line else "no line\n"
    (tmp_path / "README.md").write_text(readme)
    for tool in ("ruff", "lint-imports", "mypy", "make"):
        stub = tmp_path / "bin" / tool
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/sh\nexit {int(tool == failing)}\n")
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([tmp_path / ".ci" / "run"], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == code
    assert [text.removeprefix("+ ") for text in done.stdout.splitlines() if text.startswith("+ ")] == steps


def test_ci_has_no_copy_of_the_readme_line():
    text = (ROOT / ".ci" / "run").read_text()
    assert "pip install" not in text and "pytest" not in text


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:45])
    for part in ("```mermaid", "| method |", "```python\nfrom recbole_gr2"):
        assert part in first_screen


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The text of a page without code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_targets(page):
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            missing.append(link)
    assert missing == []


# Private words of former versions. docs/glossary.md has the standard terms.
UNCLEAR = re.compile(
    r"\b(facts?|gates?|gated(?!-gelu)|doors?|floors?|rooms?|judged|evidence|in_list|took|taken|GateError)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OLD_NAMES and page.parent.name != "results"], ids=name
)
def test_pages_use_standard_terms(page):
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [f"{page.name}:{number}: {line}" for number, line in lines if UNCLEAR.search(line)] == []


def table(page, first):
    """The cells of the Markdown table whose first heading is `first`, without headings."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def stages_of_usage():
    return [cells[0] for cells in table("usage.md", "stage")]


def test_usage_names_every_preset():
    presets = {f"`{file.stem}`" for file in (properties_folder() / "preset").glob("*.yaml")}
    assert {cells[0] for cells in table("usage.md", "preset")} == presets


def test_documented_stages_are_the_modules():
    modules = {f"stages/{file.name}" for file in (ROOT / "recbole_gr2" / "stages").glob("*.py")} - {
        "stages/__init__.py"
    }
    rows = table("architecture.md", "stage")
    assert {cells[-1] for cells in rows} == modules
    documented = {name for cells in rows for name in cells[0].split(", ") if not name.startswith("one for each")}
    assert documented == {name for name in stages_of_usage() if not name.startswith("one for each")}


# --- code ------------------------------------------------------------------------------------------------------------


def test_import_layers():
    """The contracts of pyproject.toml: layers, no import between stages, no circular import, RecBole in few modules."""
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed; the extra dev contains it")
    run([tool, "--no-cache", "--no-logo", ROOT / "pyproject.toml"], cwd=ROOT)


def test_no_module_imports_recbole_quick_start():
    """It imports Ray, which need not be installed (docs/install.md). Imports are absolute, so that rules find them."""
    forbidden = re.compile(r"^\s*(from|import) +(recbole\.quick_start|recbole import .*quick_start|\.)", re.MULTILINE)
    examples = ("from recbole import quick_start", "    import recbole.quick_start as q", "from . import errors")
    assert all(map(forbidden.match, examples)) and not forbidden.match("from recbole_gr2.quick_start import run")
    files = list((ROOT / "recbole_gr2").rglob("*.py"))
    assert len(files) > 100 and [file for file in files if forbidden.search(file.read_text())] == []


def string_constants(source):
    """The string constants of a module that are not docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }


def test_pipeline_names_no_stage_method_model_or_setting():
    properties = properties_folder()
    stages = {file.stem for file in (ROOT / "recbole_gr2" / "stages").glob("*.py")} - {"__init__"}
    methods = {name for cells in table("usage.md", "method") for name in re.findall(r"`([\w-]+)`", cells[0])}
    models = {file.stem for file in (properties / "model").glob("*.yaml")} | {"GR2Generator", "OneRecThink"}
    settings = set()
    for file in (properties / "overall.yaml", *(properties / "stage").glob("*.yaml")):
        settings |= set(yaml.safe_load(file.read_text()))
    assert len(stages) > 10 and len(methods) > 10 and len(models) > 3 and len(settings) > 100
    names = stages | set(stages_of_usage()) | methods | models | settings
    source = (ROOT / "recbole_gr2" / "pipeline.py").read_text()
    assert string_constants(source) & names == set()
    assert re.findall(r"recbole_gr2\.stages\.\w+", source) == []


def test_formatter_has_no_exceptions():
    files = [file for folder in ("recbole_gr2", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    exceptions = []
    for file in files:
        with file.open("rb") as source:
            comments = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
        exceptions += [f"{file}:{t.start[0]}" for t in comments if re.match(r"#\s*fmt:", t.string)]
    assert exceptions == []
