"""The pages of the documentation agree with the package: commands, settings, files, logged values, the notebook."""

import http.server
import importlib.util
import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import typer
import yaml
from pages import ROOT, logged_keys, site_builder
from typer.main import get_command

from recbole_gr2.commands.app import app
from recbole_gr2.config import declarations, load_settings
from recbole_gr2.config.declaration import recbole_declarations
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.quick_start import parse

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

# Commands that no test here reads, by their beginning, with the reason.
NOT_READ = {
    "python3.11 -m venv": "it creates an environment; .ci/run runs the line of README.md",
    "python3 -m venv": "it creates an environment",
    ". .venv/bin/activate": "it activates an environment",
    "pip install": "it installs packages; .ci/run runs the line of README.md",
    "python -m pytest": "it runs the tests; .ci/run runs the line of README.md",
    "export ": "it sets a variable of the shell",
    "python convert.py": "test_extending.py runs the program",
    "python -m recbole_gr2.config": "test_config.py compares its output with docs/settings.md",
    "recbole-gr2 run --base_model=LastItem": "the model exists after the steps of the page; test_extending.py runs it",
}


def commands():
    """Every command in the ```bash blocks of the pages, as (page, command)."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, part) for line in lines for part in line.split(" && ") if not part.startswith("#")]
    return found


def yaml_files(page):
    """The YAML files that a page shows with their names in the first line, as (name, text)."""
    (file,) = [file for file in PAGES if file.name == page]
    return re.findall(r"^```yaml\n# ([\w-]+\.yaml)\n(.*?)^```", file.read_text(), flags=re.MULTILINE | re.DOTALL)


def exception(command):
    """The beginning of NOT_READ that a command has, or None."""
    return next((start for start in NOT_READ if command.startswith(start)), None)


def test_there_are_commands_and_every_exception_is_needed():
    assert len(commands()) > 40
    assert {exception(command) for _, command in commands()} - {None} == set(NOT_READ)


READ = [pair for pair in commands() if not exception(pair[1])]


@pytest.mark.parametrize("page, command", READ, ids=lambda text: text)
def test_the_command_line_reads_the_commands(page, command, tmp_path, monkeypatch):
    """Names and types of options, names and values of settings, names of commands and arguments."""
    for name, text in yaml_files(page):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        arguments = launch_command_parser().parse_args(words[2:])
        assert arguments.num_processes and arguments.training_script == "run_recbole_gr2.py"
        read_run(arguments.training_script_args)
    elif words[:2] == ["python", "run_recbole_gr2.py"]:
        read_run(words[2:])
    elif words[:3] == ["python", "-m", "recbole_gr2.convert"]:
        with pytest.raises(SystemExit) as stop:
            from recbole_gr2.convert import main

            main([*words[3:], "--help"])
        assert stop.value.code == 0
    else:
        assert words[0] == "recbole-gr2", f"no rule for {command!r}; add one, or an exception with its reason"
        read_command(words[1:])


def read_run(words):
    """Read the options and settings of a run, and those of its config files that the page shows."""
    options, settings = parse(words)
    assert all(name.endswith(".yaml") for name in options.config_files)
    shown = [name for name in options.config_files if Path(name).exists()]
    load_settings(command_line=settings, config_files=shown, machine=False)


def read_command(words):
    """Read a command as the application does, without calling it."""
    command, name = get_command(app), "recbole-gr2"
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    context = command.make_context(name, words)
    if "words" in context.params:
        read_run(context.params["words"] or [])


def test_a_wrong_command_is_found():
    with pytest.raises(typer.TyperException):
        read_command(["compare", "first", "second", "--nosuch"])
    for words in (["run", "--rl_stepz=3"], ["run", "--rl_steps=few"]):
        with pytest.raises(ConfigurationError):
            read_command(words)
    with pytest.raises(KeyError):
        read_command(["nosuch"])


# --- papers ----------------------------------------------------------------------------------------------------------


def test_the_files_of_the_paper_index_exist():
    names = set(re.findall(r"`((?:recbole_gr2|properties)/[\w/.-]+)`", (ROOT / "docs" / "papers.md").read_text()))
    assert len(names) > 25
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_the_settings_of_the_paper_index_exist():
    known = {*declarations(), *recbole_declarations()}
    prefixes = {name[: name.index("_") + 1] for name in known if "_" in name} | {"onerec_think_rl_"}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)*_?)(?::[^`]*)?`", (ROOT / "docs" / "papers.md").read_text()))
    named -= {"rules", "linear", "sft", "sid", "prior", "laptop", "paper", "rerank-nokp", "only_if"}  # values
    assert len(named) > 40
    assert sorted(named - known - prefixes) == []


# --- logged values ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_logged_values_are_documented(finished):
    logged = set()
    for stage in ("midtrain", "sft", "rl"):
        logged |= {key for line in json.loads((finished.folders[stage] / "log.json").read_text()) for key in line}
    assert len(logged) > 25 and logged - logged_keys() == set()


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder():
    """The module docs/build_site.py."""
    return site_builder()


def test_the_navigation_contains_every_page(builder):
    listed = []
    for entry in SITE["nav"]:
        listed += [page for pages in entry.values() for page in pages] if isinstance(entry, dict) else [entry]
    assert len(listed) == len(set(listed))
    assert set(listed) == {place for place in builder.sources() if place.endswith(".md")}


def test_links_become_paths_of_the_site(builder):
    def rewritten(text, source="docs/a.md", place="a.md"):
        return builder.rewritten(text, source=source, place=place, pages=["b.md", "index.md", "results/c.md"])

    assert rewritten("[b](b.md#x) [c](../results/c.md)") == "[b](b.md#x) [c](results/c.md)"
    assert rewritten("[home](../README.md) [me](#here)") == "[home](index.md) [me](#here)"
    assert rewritten("[b](../docs/b.md)", "results/c.md", "results/c.md") == "[b](../b.md)"
    assert rewritten("[types](../recbole_gr2/types.py)") == "types (`recbole_gr2/types.py`)"
    assert rewritten("[types.py](../recbole_gr2/types.py)") == "`recbole_gr2/types.py`"
    assert rewritten("[gone](gone.md)") == "[gone](gone.md)"
    assert rewritten("```\n[c](../results/c.md)\n```\n") == "```\n[c](../results/c.md)\n```\n"


def test_faults_of_the_site_are_found(builder):
    page = '<p id="top"><a href="{}"></a>'
    for link in ("#top", "other.html#there", "https://example.org/x", "file.json", "."):
        site = {"index.html": page.format(link), "other.html": '<p id="there">', "file.json": ""}
        assert builder.problems(site) == []
    for link in ("#nosuch", "other.html#top", "nosuch.html"):
        site = {"index.html": page.format(link), "other.html": '<p id="there">'}
        assert builder.problems(site) == [f"index.html: no target of {link}"]
    for tag in ('<script src="//x/y.js">', '<img src="https://x/y.png">', '<link href="https://x/y.css">'):
        assert len(builder.problems({"index.html": tag})) == 1
    assert builder.problems({"index.html": '<script src="y.js">', "y.js": ""}) == []
    assert builder.problems({"a.css": "a { src: url(https://x/f.woff) }"}) == ["a.css: loads https://x/f.woff"]
    assert builder.problems({"index.html": '<pre class="mermaid">'})


def test_addresses_are_found_and_checked(tmp_path):
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    page = tmp_path / "page.md"
    page.write_text("[a](https://a.org/x), <https://b.org>. `http://localhost:8000/v1` and https://a.org/x again\n")
    assert links.addresses([page]) == {"https://a.org/x": ["page.md"], "https://b.org": ["page.md"]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # HEAD is refused
            self.send_response(200 if self.path == "/here" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert links.problem(f"{address}/here") == "" and "404" in links.problem(f"{address}/gone")
        server.shutdown()


# --- the notebook ----------------------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_notebook_has_no_stored_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(finished_command, tmp_path):
    """On the data set `tiny`, with the finished stages of its run."""
    import nbformat
    from nbclient import NotebookClient

    config = Path(finished_command.argv[1]).read_text()
    finished_command.copy(tmp_path / "saved")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    settings = {**yaml.safe_load(config), "checkpoint_dir": str(tmp_path / "saved")}
    parameters.source = f"settings = {settings!r}\nhistory, candidates = ['i00', 'i01'], ['i30', 'i02', 'i11']"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [cell.outputs[-1] for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 5 and "my_rerankers:same_category" in tables[-1]
    (ranked,) = [o["data"]["text/plain"] for o in outputs if "Reranked" in o.get("data", {}).get("text/plain", "")]
    assert all(item in ranked for item in ("i30", "i02", "i11"))
