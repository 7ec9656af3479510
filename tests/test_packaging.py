"""The package as a user gets it: the wheel, the command in it, and the README's two lines."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from recbole_gr2.config import properties_folder
from recbole_gr2.pipeline import NAMES

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "recbole_gr2", "properties")


def run(command, cwd, **environment):
    """Run without the checkout on the path; returns the finished process."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**plain, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that an old build folder cannot add to it."""
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
    """A new virtual environment with the wheel in it; dependencies are those of the running one.

    They come by a .pth file, which puts them behind the wheel on the path and does not follow an editable install.
    """
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], cwd=folder)
    return python


def test_wheel_holds_every_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(f.relative_to(ROOT)) for f in (ROOT / "recbole_gr2").rglob("*.py")}
    properties = {f"recbole_gr2/{f.relative_to(ROOT)}" for f in (ROOT / "properties").rglob("*") if f.is_file()}
    assert len(modules) > 30 and len(properties) > 15  # the globs saw the tree
    assert {f for f in packed if ".dist-info/" not in f} == modules | properties


def test_installed_command_plans_a_run(clean, tmp_path):
    where = run([clean, "-c", "import recbole_gr2.config as c; print(c.__file__, c.properties_folder())"], cwd=tmp_path)
    assert [str(ROOT) in path for path in where.stdout.split()] == [False, False]
    done = run([clean.with_name("recbole-gr2"), "--dry_run", "--preset", "smoke"], cwd=tmp_path, OMP_NUM_THREADS="1")
    rows = [line.split() for line in done.stderr.splitlines()]
    plan = [row for row in rows if row and row[0] in NAMES]
    assert [row[0] for row in plan] == list(NAMES)
    assert [row[2:] for row in plan] == [["run", "first", "time"]] * len(NAMES)
    assert not (tmp_path / "saved").exists()


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from recbole_gr2.quick_start import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'recbole', 'pandas'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = run([sys.executable, "-c", code], cwd=ROOT)
    assert "--dry_run" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def marked_line(name):
    """The one command of the README's fenced block after a marker."""
    (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (line,) = block.splitlines()
    return line


@pytest.mark.parametrize("name, last", [("run", "python run_recbole_gr2.py"), ("test", "python -m pytest")])
def test_readme_lines_are_complete(name, last):
    steps = marked_line(f"set-up-and-{name}").split(" && ")
    assert "-m venv" in steps[0] and steps[-1] == last
    assert any(step.startswith("pip install -c constraints.txt -e ") for step in steps)


def test_ci_runs_the_readme_line(tmp_path):
    """A line that fails half-way fails the run, one that succeeds passes, and a README without a line fails."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for line, code, said in (
        ("true && false && echo tested", 1, []),
        ("true && echo tested", 0, ["tested"]),
        ("", 1, None),
    ):
        readme = f"<!-- set-up-and-test -->\n```bash\n{line}\n```\n" if line else "no line\n"
        (tmp_path / "README.md").write_text(readme)
        done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stdout.splitlines() == ([f"+ {line}", *said] if line else [])
    real = (ROOT / ".ci" / "run").read_text()
    assert "pip install" not in real and "pytest" not in real  # the README's line is the only copy


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_names_every_preset_and_stage():
    text = (ROOT / "README.md").read_text()
    for name in [*(f"`{f.stem}`" for f in (properties_folder() / "preset").glob("*.yaml")), *NAMES]:
        assert f"| {name} |" in text


def test_constraints_pin_every_requirement():
    """Each package that setup.cfg asks for has exactly one tested version, and no local build of it."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 50 and all(re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(set(names)) == len(names)
    setup = (ROOT / "setup.cfg").read_text()
    block = setup.split("install_requires =")[1].split("[options.package")[0]
    asked = re.findall(r"^    ([a-z0-9-]+)(?:[<>=].*)?$", block, flags=re.MULTILINE)
    assert len(asked) > 15
    assert set(asked) - set(names) == set()
