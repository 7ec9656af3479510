"""The command line `recbole-gr2`: every command on a finished run, and its errors."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from handmade import RANKS, finished
from typer.testing import CliRunner

import recbole_gr2
from recbole_gr2.artifacts import read_per_user
from recbole_gr2.commands import main
from recbole_gr2.commands.app import app
from recbole_gr2.config import declarations
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.ranking import METRICS
from recbole_gr2.report import build_result
from recbole_gr2.run_comparison import compare_runs
from recbole_gr2.runs import check_run_name, find_run, run_folders, stage_folders
from recbole_gr2.store import locked, read_lines, write_json, write_lines

ROOT = Path(__file__).resolve().parent.parent


def called(*argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(word) for word in argv])
    return code, stdout.getvalue(), stderr.getvalue()


def printed(*argv) -> str:
    """What a command prints that succeeds."""
    code, stdout, stderr = called(*argv)
    assert code == 0, stderr
    return stdout


def refused(*argv, code: int = 2) -> str:
    """The error of a command, which has the four parts and prints nothing else."""
    found, stdout, stderr = called(*argv)
    assert (found, stdout) == (code, ""), stderr
    assert stderr.startswith("error: ") and all(f"\n  {part:5s} " in stderr for part in ("where", "why", "do")), stderr
    return stderr


# --- the application -------------------------------------------------------------------------------------------------

COMMANDS = [
    "runs",
    "compare",
    "show",
    "report",
    "rerank",
    "data check",
    "data convert",
    "tune",
    "clean",
    "doctor",
    "list methods",
    "list data",
    "list settings",
    "list presets",
]


@pytest.mark.parametrize("command", [*COMMANDS, "data", "list"])
def test_help_has_examples(command):
    """Each line of the examples is a command of its own."""
    text = printed(*command.split(), "--help")
    examples = [line.strip() for line in text.splitlines() if line.startswith("    recbole-gr2 ")]
    assert examples and all(example.startswith(f"recbole-gr2 {command}") for example in examples)


def test_every_command_is_tested():
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    names = [info.name or info.callback.__name__ for info in app.registered_commands]
    for group, commands in groups.items():
        names += [f"{group} {info.name or info.callback.__name__}" for info in commands.registered_commands]
    assert {*COMMANDS, "run"} == set(names)


def test_help_of_run(capsys):
    """It is that of run_recbole_gr2.py under another name, and names what a user needs first."""
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: recbole-gr2 run ") and "run_recbole_gr2.py" not in text
    for part in ("--data_path DIR", "--checkpoint_dir DIR", "--seed N", "--llm NAME", "--name NAME", "--dry_run"):
        assert part in text
    assert "recbole-gr2 list settings" in text and "  recbole-gr2 run --dataset mine --data_path data" in text


def test_help_and_version():
    assert "compare" in printed() and printed() == printed("--help") == printed("-h")
    assert printed("--version") == f"recbole-gr2 {recbole_gr2.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["runz"], "did you mean run"),
        (["data", "chek"], "did you mean check"),
        (["list", "preset"], "did you mean presets"),
        (["compare", "a"], "missing argument 'B'"),
        (["compare", "a", "b", "c"], "unexpected extra argument"),
        (["list"], "missing command"),
        (["runs", "--jsn"], "Possible options: --json"),
        (["runs", "--dataset"], "requires an argument"),
        (["list", "settings", "rl_stpes"], "rl_steps"),
        (["show", "latest"], "missing argument 'USER'"),
    ],
)
def test_mistakes_in_a_command_are_one_error(argv, text):
    assert text in refused(*argv)


@pytest.mark.parametrize("first", [["run"], []])
def test_run_gets_all_words_as_they_are(first, monkeypatch):
    calls = []
    monkeypatch.setattr("recbole_gr2.quick_start.main", lambda argv, program: calls.append((argv, program)) or 5)
    words = [
        "--dataset",
        "x",
        "-m",
        "GR2",
        "--eval_rows=[sft, rl]",
        "--config_files",
        "a.yaml",
        "b.yaml",
        "--show_prompt",
    ]
    assert main([*first, *words, "--version_of_mine=1", "--force"]) == 5
    assert calls == [([*words, "--version_of_mine=1", "--force"], "recbole-gr2 run")]


def test_errors_of_run_keep_their_exit_codes(tmp_path):
    assert "did you mean ml-100k" in refused("run", "--dataset=ml-100", "--preset=smoke", code=4)
    assert "unknown key 'versoin'" in called("--versoin=1", "--preset=smoke")[2]


def test_an_interrupted_command_has_the_exit_code_130(monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_gr2.commands.runs.run_folders", interrupt)
    code, _, stderr = called("runs")
    assert code == 130 and stderr == "interrupted\n"
    monkeypatch.setattr("recbole_gr2.tuning.tune", interrupt)
    code, _, stderr = called("tune", "space.yaml")
    assert code == 130 and stderr == "interrupted; what is finished is kept, and the same command continues\n"


def completed(monkeypatch, *words: str) -> list[str]:
    """What bash would offer after these words."""
    monkeypatch.setenv("_RECBOLE_GR2_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["recbole-gr2", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit):
        main([])
    monkeypatch.delenv("_RECBOLE_GR2_COMPLETE")
    return stdout.getvalue().split()


def test_shell_completion(monkeypatch, finished_command):
    assert completed(monkeypatch, "com") == ["compare"]
    assert completed(monkeypatch, "list", "se") == ["settings"]
    assert completed(monkeypatch, "runs", "--js") == ["--json"]
    assert completed(monkeypatch, "run", "--rl_st") == ["--rl_start", "--rl_steps"]
    assert completed(monkeypatch, "run", "--dry") == ["--dry_run"]
    assert completed(monkeypatch, "run", "--preset", "sm") == ["smoke"]
    assert completed(monkeypatch, "run", "--rl_steps=3", "--preset", "=", "la") == ["laptop"]
    assert completed(monkeypatch, "data", "check", "--data_p") == ["--data_path"]
    name = finished_command.path.parent.name
    assert completed(monkeypatch, "show", "--checkpoint_dir", str(finished_command.root), name[:6]) == [name]


def test_names_need_no_large_library(tmp_path):
    """Help, lists of runs and settings, and errors of names import neither torch nor pandas nor RecBole."""
    code = """
import sys
from recbole_gr2.commands import main
for words in ("--help", "runs", "runz", "compare a b", "show a u", "rerank a b", "clean", "list settings rl_",
              "list presets", "list data", "run --preset=smok", "data check --dataset=ml-100"):
    main(words.split())
    large = {"torch", "pandas", "recbole", "transformers", "scipy"} & set(sys.modules)
    if large:
        sys.exit(f"{words}: {large}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 6


@pytest.mark.slow
def test_module_is_the_command(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-m", "recbole_gr2", "compare"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")
    assert time.monotonic() - started < 20  # under a second on an idle machine; torch alone takes several


# --- runs by name ----------------------------------------------------------------------------------------------------


def run_folder(root: Path, dataset: str, name: str, age: int = 0) -> Path:
    folder = root / "gr2" / dataset / "runs" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"command": "x", "stages": {}}')
    (folder / "result.json").write_text("{}")
    os.utime(folder / "result.json", (10**9 - age, 10**9 - age))
    return folder


def test_runs_are_found(tmp_path):
    root = tmp_path / "saved"
    first, second = run_folder(root, "a", "first", age=20), run_folder(root, "a", "second", age=10)
    other, third = run_folder(root, "b", "second", age=30), run_folder(root, "b", "third", age=40)
    (root / "gr2" / "a" / "runs" / "unfinished").mkdir()
    assert run_folders(root) == [second, first, other, third]
    for name in (first, first / "result.json", "first", "a/first"):
        assert find_run(name, root) == first
    assert find_run("latest", root) == second and find_run("b/second", root) == other
    with pytest.raises(ConfigurationError, match="2 data sets have a run 'second'.*") as error:
        find_run("second", root)
    assert error.value.do == "write a/second or b/second"
    with pytest.raises(MissingFileError, match="there is no run 'frist'") as error:
        find_run("frist", root)
    assert error.value.do.startswith("did you mean first")
    for name in ("unfinished", "", "a/third", "latest/first", tmp_path):
        with pytest.raises(MissingFileError):
            find_run(name, root)
    with pytest.raises(MissingFileError, match="there is no run 'latest'"):
        find_run("latest", tmp_path)


def test_the_folder_of_an_ablation_is_no_run(tmp_path):
    folder = tmp_path / "gr2" / "a" / "ablations" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="is not the folder of a run"):
        find_run(folder)


@pytest.mark.parametrize("name", ["", "latest", ".", "..", "a/b", "-a", "a b", "ä", "a" * 101, "a\n"])
def test_names_of_runs_are_checked(name):
    with pytest.raises(ConfigurationError):
        check_run_name(name)
    assert check_run_name("a.b-c_1") is None


def test_stages_are_found_after_a_move(finished_command, tmp_path):
    """The folders of stages are relative to that of the run, whatever run.json says."""
    moved = tmp_path / "moved"
    shutil.copytree(finished_command.root, moved)
    folder = find_run("latest", moved)
    for path in (folder, Path(os.path.relpath(folder))):
        stages = stage_folders(path)
        assert list(stages) == list(finished_command.stages)
        assert all(
            each.resolve().is_relative_to(moved) and (each / "manifest.json").is_file() for each in stages.values()
        )


@pytest.mark.slow
def test_a_named_run_has_its_folder(finished_command, tmp_path):
    """The same run replaces its report. Another run of the name is refused before it computes anything."""
    argv = ["run", *finished_command.copy(tmp_path / "saved")]
    stages = tmp_path / "saved" / "gr2" / "tiny" / "stages"
    before = sorted(stages.glob("*/*"))
    folder = tmp_path / "saved" / "gr2" / "tiny" / "runs" / "mine"
    for _ in range(2):
        assert printed(*argv, "--name", "mine").splitlines()[-1] == str(folder / "result.json")
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    assert json.loads((folder / "result.json").read_text())["command"].startswith("recbole-gr2 run --config_files")
    error = refused_run(*argv, "--name=mine", "--prior_steps=11")
    assert "the run 'mine' exists and is another one: prior_steps 10 -> 11" in error
    assert "is another one" in refused_run(*argv, "--name=mine", "--seeds=2020,2021")
    assert "cannot have the name '../x'" in refused_run(*argv, "--name=../x")
    assert sorted(stages.glob("*/*")) == before


def refused_run(*argv) -> str:
    """The error of a run. The lines before it are those of its progress."""
    code, stdout, stderr = called(*argv)
    assert (code, stdout) == (2, "")
    return stderr[stderr.index("error: ") :]


def test_a_named_ablation_has_its_folder(finished_command, tmp_path):
    argv = ["run", *finished_command.copy(tmp_path / "saved"), "--name=mine"]
    file = tmp_path / "small.yaml"
    file.write_text("stages: [embeddings]\ncolumns: {items: embeddings.items}\nvariants: [{name: all}]\n")
    for _ in range(2):
        path = Path(printed(*argv, f"--ablation={file}").splitlines()[-1])
        assert path.parent == tmp_path / "saved" / "gr2" / "tiny" / "ablations" / "mine"
    file.write_text("stages: [embeddings]\ncolumns: {items: embeddings.items}\nvariants: [{name: other}]\n")
    assert "the ablation 'mine' exists and is another one" in refused_run(*argv, f"--ablation={file}")


@pytest.mark.slow
def test_a_named_run_of_several_seeds(finished_command, tmp_path):
    """Each seed has a run of its own name. `runs`, `show` and `clean` know them."""
    root = tmp_path / "saved"
    argv = ["run", *finished_command.copy(root), "--name=mine", "--eval_rows=[lambdamart]", "--seeds=2020,2021"]
    path = Path(printed(*argv).splitlines()[-1])
    names = {"mine", "mine-2020", "mine-2021"}
    assert path.parent.name == "mine" and {run.name for run in path.parent.parent.iterdir()} == names
    assert Path(printed(*argv).splitlines()[-1]) == path
    assert "the run 'mine-2020' exists and is another one: prior_steps 10 -> 11" in refused_run(
        *argv, "--prior_steps=11"
    )
    listed = {run["name"]: run for run in json.loads(printed("runs", "--json", "--checkpoint_dir", root))}
    assert set(listed) == names and listed["mine"]["seeds"] == [2020, 2021] and not listed["mine"]["missing_stages"]
    assert "name the run of one seed: mine-2020, mine-2021" in refused("show", "mine", "u3", "--checkpoint_dir", root)
    compared = json.loads(printed("compare", "mine-2020", "mine", "--json", "--checkpoint_dir", root))
    assert {entry["method"] for entry in compared["methods"]} == {"base", "prior", "lambdamart"}
    shutil.move(path.parents[1] / "mine-2021", tmp_path)
    error = refused("clean", "--checkpoint_dir", root, code=4)
    assert "the run mine reports over mine-2021, which does not exist any more" in error
    shutil.move(tmp_path / "mine-2021", path.parents[1])
    error = refused("clean", "--runs", "mine-2021", "--checkpoint_dir", root)
    assert "remove both: --runs mine,mine-2021" in error
    printed("clean", "--yes", "--runs", "mine,mine-2021", "--checkpoint_dir", root)
    assert [run["name"] for run in json.loads(printed("runs", "--json", "--checkpoint_dir", root))] == ["mine-2020"]
    assert printed("clean", "--dry_run", "--checkpoint_dir", root).startswith("nothing to remove")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_listed(finished_command, tmp_path):
    root = tmp_path / "saved"
    shutil.copytree(finished_command.root, root)
    (run,) = json.loads(printed("runs", "--checkpoint_dir", root, "--json"))
    entries = [e for e in finished_command.result["methods"] if e["scope"] == "all_users" and not e["diagnostic"]]
    best = max(entries, key=lambda entry: entry["metrics"]["ndcg@10"]["mean"])
    assert (run["name"], run["dataset"], run["seeds"]) == (finished_command.path.parent.name, "tiny", [2020])
    assert (run["base_model"], run["llm"], run["preset"]) == ("CausalSASRec", "random", "smoke")
    assert (run["best_method"], run["metric"], run["value"]) == (
        best["method"],
        "ndcg@10",
        best["metrics"]["ndcg@10"]["mean"],
    )
    assert run["stages"] == len(finished_command.stages) and run["missing_stages"] == []
    assert "complete" in printed("runs", "--checkpoint_dir", root, "--dataset", "tiny")
    shutil.rmtree(stage_folders(find_run("latest", root))["midtrain"])
    assert f"1 of {run['stages']} removed" in printed("runs", "--checkpoint_dir", root)
    assert "did you mean tiny" in refused("runs", "--checkpoint_dir", root, "--dataset", "tinny")


def test_a_damaged_run_is_named_and_the_others_are_listed(finished_command, tmp_path):
    root = tmp_path / "saved"
    shutil.copytree(finished_command.root, root)
    run_folder(root, "tiny", "damaged")
    code, stdout, stderr = called("runs", "--checkpoint_dir", root)
    assert code == 0 and "CausalSASRec" in stdout and "warning: result.json of the run damaged cannot be read" in stderr
    assert "remove the folder" in refused("compare", "damaged", "latest", "--checkpoint_dir", root, code=1)


def test_no_runs(tmp_path):
    assert printed("runs", "--checkpoint_dir", tmp_path) == f"no run is finished in {tmp_path / 'gr2'}\n"
    assert json.loads(printed("runs", "--checkpoint_dir", tmp_path, "--json")) == []
    assert "no run is finished there" in refused("show", "latest", "u", "--checkpoint_dir", tmp_path, code=4)


# --- compare ---------------------------------------------------------------------------------------------------------

CONFIG = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
    "eval_max_lists": None,
    "cand_file": None,
    "cand_pool": None,
    "cand_num": 10,
    "eval_draws": 500,
    "data_path": "data",
    "rl_steps": 5,
}


def written(
    root: Path, name: str, *, config: dict | None = None, targets: dict | None = None, seeds=(2020,), **options
) -> Path:
    """The folder of a finished run that is made by hand: what programs read, without the report."""
    made = []
    for seed in seeds:
        run = finished(root / name / str(seed), seed=seed, **options)
        run = replace(run, config=yaml.safe_dump({**CONFIG, **(config or {}), "seed": seed}))
        lines = [{"user_id": u, "target": f"i-{u}", "candidates": list("0123456789")} for u in "abcdefgh"]
        for line in lines:
            line["target"] = (targets or {}).get(line["user_id"], line["target"])
        write_lines(run.folders["candidates"] / "test.jsonl", lines)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(run.path, build_result([run], run.command))
        folders = {stage: str(folder) for stage, folder in run.folders.items()}
        write_json(run.path.parent / "run.json", {"command": run.command, "stages": folders})
        (run.path.parent / "config.yaml").write_text(run.config, encoding="utf-8")
        made.append(run)
    return made[0].path.parent


OTHER = {**RANKS, "sft": [1, 1, 2, 2, 2, 9], "prior": [1, 1, 3, 4, 8, 4]}


def test_differences_are_those_of_all_users(tmp_path):
    """A user whose list of one run does not contain the target counts there as 0."""
    first = written(tmp_path, "first")
    second = written(tmp_path, "second", ranks=OTHER, users="bcdefg", config={"rl_steps": 7, "data_path": "elsewhere"})
    compared = compare_runs(first, second)
    assert compared["users"] == 60 and compared["settings"] == {"rl_steps": [5, 7]}
    by_place = {(entry["method"], entry["metric"]): entry for entry in compared["methods"]}
    assert {method for method, _ in by_place} == {"base", "prior", "sft"}
    assert {metric for _, metric in by_place} == set(METRICS)
    for (method, metric), entry in by_place.items():
        expected = METRICS[metric](OTHER[method]).sum() - METRICS[metric](RANKS[method]).sum()
        assert entry["diff"] == pytest.approx(expected / 60)
        assert entry["second"] - entry["first"] == pytest.approx(entry["diff"], abs=1e-4)  # rounded by RecBole
        assert entry["low"] <= entry["diff"] <= entry["high"] and entry["p"] <= entry["p_holm"]
    # sft has the target first for three of six users in the first run, and for two of six in the second one.
    assert by_place["sft", "recall@1"]["diff"] == pytest.approx((2 - 3) / 60)
    backwards = {(e["method"], e["metric"]): e for e in compare_runs(second, first)["methods"]}
    assert all(backwards[place]["diff"] == pytest.approx(-entry["diff"]) for place, entry in by_place.items())


def test_equal_runs_do_not_differ(tmp_path):
    compared = compare_runs(
        written(tmp_path, "first"), written(tmp_path, "second"), methods=["sft"], metrics=["ndcg@5"]
    )
    (entry,) = compared["methods"]
    assert (entry["diff"], entry["low"], entry["high"], entry["p"], entry["p_holm"]) == (0, 0, 0, 1, 1)
    assert compared["settings"] == {}


def test_cut_offs_above_the_lists_are_not_tested(tmp_path):
    """The rank of a target that the list of five does not contain is unknown, and could be 6 to 10."""
    folders = [written(tmp_path, "first"), written(tmp_path, "second", config={"cand_num": 5})]
    compared = compare_runs(*folders)
    assert compared["list_length"] == 5
    assert {e["metric"] for e in compared["methods"] if "p" in e} == {"recall@1", "recall@5", "ndcg@5"}
    assert "the length of the lists, 5" in printed("compare", *folders)
    imported = written(tmp_path, "third", config={"cand_file": "lists.jsonl", "cand_num": 20})
    assert compare_runs(folders[0], imported)["list_length"] == 10


def test_seeds_are_averaged_for_each_user(tmp_path):
    first = written(tmp_path, "first")
    one, two = (written(tmp_path, name, ranks=ranks) for name, ranks in (("one", RANKS), ("two", OTHER)))
    both = tmp_path / "first" / "2020" / "runs" / "both"
    both.mkdir()
    for name, folder in (("one", one), ("two", two)):
        shutil.copytree(folder, both.parent / name)
        stages = {s: Path(p) for s, p in json.loads((folder / "run.json").read_text())["stages"].items()}
        for path in stages.values():
            shutil.copytree(path, tmp_path / "first" / "2020" / "stages" / f"{name}-{path.name}")
        run = {"stages": {stage: f"x/stages/{name}-{path.name}" for stage, path in stages.items()}}
        (both.parent / name / "run.json").write_text(json.dumps(run))
    shutil.copy(one / "config.yaml", both)
    result = json.loads((one / "result.json").read_text())
    (both / "result.json").write_text(json.dumps({**result, "seeds": [2020, 2021]}))
    (both / "run.json").write_text(json.dumps({"runs": ["x/one/result.json", "x/two/result.json"]}))
    compared = {(e["method"], e["metric"]): e["diff"] for e in compare_runs(first, both)["methods"]}
    alone = {(e["method"], e["metric"]): e["diff"] for e in compare_runs(first, two)["methods"]}
    assert compared == pytest.approx({place: diff / 2 for place, diff in alone.items()})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"everyone": 61}, "different numbers of users: 60 and 61"),
        (
            {"config": {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "none"}}},
            "different splits",
        ),
        ({"config": {"eval_max_lists": 50}}, "sample different numbers of users"),
        ({"targets": {"c": "i-z"}}, "1 users have different test targets, for example c"),
    ],
)
def test_runs_on_other_users_are_refused(options, text, tmp_path):
    folders = written(tmp_path, "first"), written(tmp_path, "second", **options)
    assert text in refused("compare", *folders)


def test_samples_of_other_seeds_are_refused(tmp_path):
    sample = {"eval_max_lists": 6}
    first, same = written(tmp_path, "first", config=sample), written(tmp_path, "same", config=sample)
    assert compare_runs(first, same)["users"] == 60
    other = written(tmp_path, "other", config=sample, seeds=[2021])
    assert "sample different users (eval_max_lists), because their seeds differ" in refused("compare", first, other)


def test_runs_on_other_data_and_unknown_names_are_refused(finished_command, tmp_path):
    first, second = written(tmp_path, "first"), written(tmp_path, "second")
    error = refused("compare", first, finished_command.path)
    assert "different data sets: ml-100k and tiny" in error
    assert "did you mean sft" in refused("compare", first, second, "--methods", "sft,stf")
    assert "did you mean ndcg@5" in refused("compare", first, second, "--metric", "ndgc@5")
    shutil.rmtree(json.loads((second / "run.json").read_text())["stages"]["evaluate"])
    assert "has no finished evaluate any more" in refused("compare", first, second, code=4)


def test_a_run_equals_itself(finished_command):
    path = finished_command.path
    text = printed("compare", path, path.parent, "--methods", "sft,rl,oracle", "--metric", "recall@1,ndcg@5,mrr@5")
    assert "All settings that can change a result are equal." in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("sft", "rl", "oracle"))]
    assert [row[:2] for row in rows] == [
        [m, k] for m in ("sft", "rl", "oracle") for k in ("recall@1", "ndcg@5", "mrr@5")
    ]
    assert all(row[2] == row[3] for row in rows)
    assert all(
        row[4:] == ([] if row[1] == "mrr@5" else ["+0.0000", "[+0.0000,", "+0.0000]", "1.0000", "1.0000"])
        for row in rows
    )


# --- show ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hit_user(finished_command) -> str:
    """A user whose list contains the target."""
    lines = read_lines(finished_command.stages["prior"] / "test.jsonl")
    return next(line["user_id"] for line in lines if line["target"] in line["candidates"])


def test_show_agrees_with_the_files_of_the_run(finished_command, hit_user):
    shown = json.loads(printed("show", finished_command.path, hit_user, "--json"))
    (line,) = [x for x in read_lines(finished_command.stages["prior"] / "test.jsonl") if x["user_id"] == hit_user]
    sids = {x["item_id"]: x["sid"] for x in read_lines(finished_command.stages["tokenizer"] / "sids.jsonl")}
    assert [item["item"] for item in shown["candidates"]] == line["candidates"]
    assert [item["item"] for item in shown["history"]] == line["history"][-4:]  # prompt_history of the preset smoke
    assert shown["earlier"] == len(line["history"]) - len(shown["history"])
    assert (shown["target"]["item"], shown["target"]["rank"]) == (
        line["target"],
        line["candidates"].index(line["target"]) + 1,
    )
    for item in shown["candidates"]:
        kind, number = int(item["item"][1]), int(item["item"][2])
        names = ["Lamp", "Chair", "Brush", "Novel", "Kettle", "Racket"]
        assert item["title"] == f"{names[kind]} number {number}" and item["sid"] == sids[item["item"]]
        assert item["target"] == (item["item"] == line["target"])
    assert shown["answers"]["oracle"]["order"][0] == line["target"]
    assert shown["answers"]["base"]["order"] == line["candidates"]
    for method in ("lambdamart", "sft", "rl"):
        answers = read_lines(finished_command.stages[f"rerank_{method}"] / "rankings.jsonl")
        (answer,) = [answer for answer in answers if answer["request_id"] == line["request_id"]]
        assert shown["answers"][method]["order"] == answer["ranking"]
        assert [item["ranks"][method] for item in shown["candidates"]] == [
            answer["ranking"].index(item) + 1 for item in line["candidates"]
        ]
    text = printed("show", finished_command.path, hit_user, "--method", "sft")
    assert "rl" not in text.split() and all(item["title"] in text for item in shown["candidates"])


def test_ranks_of_show_are_those_of_the_evaluation(finished_command):
    """For every hit user and method, the rank of the target is that of per_user.csv."""
    from recbole_gr2.config import load_settings
    from recbole_gr2.report.answers import describe

    folder, stages = finished_command.path.parent, finished_command.stages
    settings = load_settings(config_files=[folder / "config.yaml"])
    frame = read_per_user(stages["evaluate"])[::20]
    assert len(frame) >= 5
    for row in frame.to_dict("records"):
        shown = describe(finished_command.result, stages, settings, row["user"])
        (target,) = [item for item in shown["candidates"] if item["target"]]
        assert target["ranks"] == {method: row[method] for method in target["ranks"]} and len(target["ranks"]) == 8


def test_reasoning_is_shown_with_titles_and_checks(finished_command, tmp_path, hit_user):
    root = tmp_path / "saved"
    shutil.copytree(finished_command.root, root)
    stages = stage_folders(find_run("latest", root))
    (line,) = [x for x in read_lines(stages["prior"] / "test.jsonl") if x["user_id"] == hit_user]
    sids = {x["item_id"]: x["sid"] for x in read_lines(stages["tokenizer"] / "sids.jsonl")}
    from recbole_gr2.sid.tokens import sid_text

    cited = line["candidates"][0]
    names = ["Lamps", "Chairs", "Brushs", "Novels", "Kettles", "Rackets"]
    sid, kind = sid_text(tuple(sids[cited])), names[int(cited[1])]
    text = f"The shopper takes Spoons. {sid}: {kind}, the same brand, Nobody. Best is {sid}"
    answers = list(read_lines(stages["rerank_sft"] / "rankings.jsonl"))
    for answer in answers:
        if answer["request_id"] == line["request_id"]:
            answer["reasoning"] = text
    write_lines(stages["rerank_sft"] / "rankings.jsonl", answers)
    answer = json.loads(printed("show", "latest", hit_user, "--json", "--checkpoint_dir", root))["answers"]["sft"]
    assert answer["statements"] == {"habit": False, "kind": True, "why": False}
    same = {token for token, codes in sids.items() if codes == sids[cited]}
    titles = {f"{names[int(token[1])].removesuffix('s')} number {token[2]}" for token in same}
    assert answer["reasoning"] in {text.replace(sid, f"[{title}]") for title in titles}
    shown = printed("show", "latest", hit_user, "--checkpoint_dir", root)
    assert answer["reasoning"] in shown and "habit false, kind true, why false" in shown
    config = find_run("latest", root) / "config.yaml"
    config.write_text(config.read_text().replace("trace_teacher: rules", "trace_teacher: local_llm"))
    assert "not checked: only sentences" in printed("show", "latest", hit_user, "--checkpoint_dir", root)


def test_show_names_the_methods_that_did_not_rank_a_list(finished_command):
    lines = read_lines(finished_command.stages["prior"] / "test.jsonl")
    user = next(line["user_id"] for line in lines if line["target"] not in line["candidates"])
    shown = json.loads(printed("show", finished_command.path, user, "--json"))
    assert set(shown["answers"]) == {"base", "oracle", "prior"} and "sft" in shown["not_ranked"]
    ranked = [line["request_id"] for line in read_lines(finished_command.stages["rerank_sft"] / "rankings.jsonl")]
    assert shown["ranked_users"] == [name.removeprefix("test/") for name in ranked[:3]] and len(ranked) >= 3
    text = printed("show", finished_command.path, user)
    assert shown["target"]["rank"] is None and "not among the candidates" in text
    assert f"users with a ranked list: {', '.join(shown['ranked_users'])}\n" in text


def test_mistakes_of_show(finished_command, tmp_path, hit_user):
    path = finished_command.path
    assert "did you mean sft" in refused("show", path, hit_user, "--method", "stf")
    assert "no test list of a user 'nobody'" in refused("show", path, "nobody")
    assert "with --data_path DIR" in refused("show", path, hit_user, "--data_path", tmp_path, code=4)


def test_show_reads_moved_data(finished_command, tmp_path, hit_user, tiny_data):
    (tmp_path / "tiny").mkdir()
    text = (tiny_data / "tiny" / "tiny.item").read_text().replace("number", "No.")
    (tmp_path / "tiny" / "tiny.item").write_text(text)
    assert " No. " in printed("show", finished_command.path, hit_user, "--data_path", tmp_path)


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_writes_the_files_of_a_run_again(finished_command, tmp_path):
    root = tmp_path / "saved"
    shutil.copytree(finished_command.root, root)
    folder = find_run("latest", root)
    names = ["report.md", "report.html", "table.tex"]
    before = {name: (folder / name).read_text() for name in names}
    for name in names:
        (folder / name).unlink()
    written = printed("report", "latest", "--checkpoint_dir", root).splitlines()
    assert written == [str(folder / name) for name in names]
    assert {name: (folder / name).read_text() for name in names} == before
    assert "smoke run" in before["report.md"] and "smoke run" in before["table.tex"]
    data = before["report.html"].split('<script id="data" type="application/json">')[1].split("</script>")[0]
    frame = read_per_user(stage_folders(folder)["evaluate"])
    for user, row in zip(json.loads(data)["users"], frame.to_dict("records"), strict=True):
        place = user["candidates"].index(user["target"])
        assert user["id"] == row["user"] and {name: each[place] for name, each in user["ranks"].items()} == {
            name: row[name] for name in user["ranks"]
        }


@pytest.mark.slow
def test_report_for_papers(finished_command, tmp_path):
    path, latex, html = finished_command.path, tmp_path / "new" / "table.tex", tmp_path / "page.html"
    options = ["--methods", "base,lambdamart,sft", "--metrics", "recall@5,ndcg@10"]
    written = printed("report", path, "--latex", latex, *options, "--figures", tmp_path / "f", "--html", html)
    assert written.splitlines()[:2] == [str(latex), str(html)] and str(tmp_path / "f" / "gap.pdf") in written
    assert {file.suffix for file in (tmp_path / "f").iterdir()} == {".pdf"}
    text = latex.read_text()
    assert [line.split(" &")[0] for line in text.splitlines() if " & " in line] == [
        *("Method", "Base order", "LambdaMART", "GR2, SFT")
    ]
    assert "all users" in text and r"\label{tab:tiny-all-users}" in text
    compared = ["--versus=prior", "--methods=base,prior,sft,rl", "--caption=C", "--label=L"]
    printed("report", path, "--latex", latex, "--scope=hit_users", *compared)
    assert r"\caption{C}" in latex.read_text() and r"\label{L}" in latex.read_text()


def test_report_of_several_runs_and_of_an_ablation(finished_command, tmp_path):
    root, latex = tmp_path / "saved", tmp_path / "table.tex"
    shutil.copytree(finished_command.root, root)
    first = find_run("latest", root)
    shutil.copytree(first, first.with_name("second"))
    printed("report", first.name, "second", "--latex", latex, "--checkpoint_dir", root, "--methods", "base,sft")
    assert rf"\emph{{{first.name}}}".replace("_", r"\_") in latex.read_text() and r"\emph{second}" in latex.read_text()
    column = "evaluate.methods.method=sft&scope=hit_users.metrics.ndcg@10"
    ablation = root / "gr2" / "tiny" / "ablations" / "mine"
    ablation.mkdir(parents=True)
    variants = [{"name": "a", "figures": {"sft ndcg@10": 0.5}}, {"name": "b", "figures": {"sft ndcg@10": 0.6}}]
    content = {
        "ablation": "mine",
        "dataset": "tiny",
        "split": "test",
        "preset": "laptop",
        "columns": {"sft ndcg@10": column},
    }
    (ablation / "result.json").write_text(json.dumps({**content, "variants": variants}))
    for name in ("mine", "tiny/mine", ablation):
        printed("report", name, "--latex", latex, "--checkpoint_dir", root)
        assert r"b & \textbf{.6000} \\" in latex.read_text()
    assert "mine is an ablation" in refused("report", "mine", "--checkpoint_dir", root)
    assert "3 runs are named, one of them twice" in refused(
        "report", "second", "second", first.name, "--latex", latex, "--checkpoint_dir", root
    )
    assert "2 runs are named" in refused("report", "second", first.name, "--html", "x", "--checkpoint_dir", root)


@pytest.mark.slow
def test_mistakes_of_report(finished_command, tmp_path):
    path, latex = finished_command.path, tmp_path / "t.tex"
    assert "did you mean hit_users" in refused("report", path, "--latex", latex, "--scope", "hit_user")
    assert "did you mean sft" in refused("report", path, "--latex", latex, "--methods", "stf")
    assert "did you mean sft" in refused("report", path, "--figures", tmp_path, "--methods", "stf")
    assert "did you mean ndcg@10" in refused("report", path, "--latex", latex, "--metrics", "ndgc@10")
    assert "--versus is given without --latex" in refused("report", path, "--versus", "prior")
    assert "--methods is given without --latex or --figures" in refused("report", path, "--methods", "sft")
    assert "cannot write" in refused("report", path, "--latex", tmp_path)
    assert "with --data_path DIR" in refused("report", path, "--html", latex, "--data_path", tmp_path, code=4)
    assert "missing argument 'RUN...'" in refused("report")
    assert not latex.exists()


# --- rerank ----------------------------------------------------------------------------------------------------------


def test_rerank_calls_the_api(finished_command, tmp_path, monkeypatch):
    calls = []
    api = type(sys)("recbole_gr2.api")
    api.rerank_file = lambda *args, **options: calls.append((args, options))
    monkeypatch.setitem(sys.modules, "recbole_gr2.api", api)
    lists, output = tmp_path / "lists.jsonl", tmp_path / "out.jsonl"
    assert "there is no file" in refused("rerank", finished_command.path, lists, code=4)
    lists.write_text("{}\n")
    printed("rerank", "latest", lists, "--checkpoint_dir", finished_command.root)
    printed("rerank", finished_command.path, lists, "--method=rl", "--output", output, "--data_path=d")
    folder = finished_command.path.parent
    assert calls == [
        ((folder, lists, None), {"method": None, "data_path": None}),
        ((folder, lists, output), {"method": "rl", "data_path": "d"}),
    ]


# --- data check ------------------------------------------------------------------------------------------------------


def test_data_check_prints_the_summary(finished_command, tmp_path):
    config = finished_command.argv[1]
    text = printed("data", "check", "--config_files", config)
    assert text.startswith("150 users, 60 items, ") and "0 items without brand" in text
    assert "without brand" not in printed("data", "check", "--config_files", config, "--text_brand=~")


def test_mistakes_of_data_check(finished_command, tmp_path):
    config = finished_command.argv[1]
    assert "--force, --name belongs to a run" in refused("data", "check", "--force", "--name=x")
    assert "unknown key 'data_pth'" in called("data", "check", "--data_pth=x", "--preset=smoke")[2]
    assert "did you mean tiny" in refused("data", "check", "--config_files", config, "--dataset=tinny", code=4)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tiny.inter").write_text("user,item\n1,2\n")
    code, stdout, stderr = called("data", "check", "--config_files", config, "--data_path", tmp_path)
    assert (code, stdout) == (2, "") and "tiny.inter" in stderr and stderr.startswith("error: ")


# --- clean -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(finished_command, tmp_path):
    """A copy of the results of a run, with a stage that no run uses, and one that was interrupted."""
    root = tmp_path / "saved"
    shutil.copytree(finished_command.root, root)
    stages = root / "gr2" / "tiny" / "stages"
    shutil.copytree(stage_folders(find_run("latest", root))["prior"], stages / "prior" / "000000000000")
    (stages / "sft" / "111111111111" / "checkpoints").mkdir(parents=True)
    (stages / "sft" / "111111111111" / "checkpoints" / "part").write_bytes(b"x" * 3000)
    return root


def stage_paths(root: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in root.glob("gr2/*/stages/*/*")}


def test_clean_removes_what_no_run_uses(results):
    before = stage_paths(results)
    text = printed("clean", "--dry_run", "--checkpoint_dir", results)
    rows = {line.split()[0]: line.split()[1:4] for line in text.splitlines() if line.startswith("gr2/")}
    assert rows.keys() == {"gr2/tiny/stages/prior/000000000000", "gr2/tiny/stages/sft/111111111111"}
    assert rows["gr2/tiny/stages/prior/000000000000"][0] == "finished"
    assert rows["gr2/tiny/stages/sft/111111111111"] == ["unfinished", "2.9", "KiB"]
    assert stage_paths(results) == before
    assert "removed 2 folders" in printed("clean", "--yes", "--checkpoint_dir", results)
    assert stage_paths(results) == before - {"prior/000000000000", "sft/111111111111"}
    assert printed("clean", "--yes", "--checkpoint_dir", results).startswith("nothing to remove")


def test_clean_asks(results, monkeypatch):
    before = stage_paths(results)
    for answer in ("n\n", "\n", ""):
        done = CliRunner().invoke(app, ["clean", "--checkpoint_dir", str(results)], input=answer)
        assert done.exit_code == 1 and stage_paths(results) == before
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, stderr = called("clean", "--checkpoint_dir", results)
    assert code == 130 and "nothing was changed" in stderr and stage_paths(results) == before
    assert CliRunner().invoke(app, ["clean", "--checkpoint_dir", str(results)], input="y\n").exit_code == 0
    assert len(stage_paths(results)) == len(before) - 2


def test_clean_removes_a_run_with_its_stages(results):
    name = find_run("latest", results).name
    assert "did you mean" in refused("clean", "--runs", f"{name}x", "--checkpoint_dir", results, code=4)
    text = printed("clean", "--yes", "--runs", name, "--checkpoint_dir", results)
    assert f"gr2/tiny/runs/{name}" in text and stage_paths(results) == set() and run_folders(results) == []


def test_clean_keeps_stages_of_ablations_and_inputs(results):
    """A stage of an ablation counts with the stages that it was computed from."""
    folder = find_run("latest", results)
    stages = stage_folders(folder)
    keys = {"embeddings", "tokenizer"}
    ablation = folder.parents[1] / "ablations" / "x"
    ablation.mkdir(parents=True)
    variant = {"stages": [{"stage": "tokenizer", "key": [stages["tokenizer"].name]}]}
    (ablation / "result.json").write_text(json.dumps({"variants": [variant]}))
    printed("clean", "--yes", "--runs", folder.name, "--checkpoint_dir", results)
    assert stage_paths(results) == {f"{name}/{stages[name].name}" for name in keys}


def test_clean_leaves_a_data_set_that_is_in_use(results):
    before = stage_paths(results)
    for shared in (False, True):
        with locked(stage_folders(find_run("latest", results))["rl"], shared=shared):
            text = printed("clean", "--yes", "--checkpoint_dir", results)
            assert "tiny is left as it is: a process works on rl/" in text and stage_paths(results) == before


def test_clean_stays_in_its_folder(results, tmp_path):
    outside, stages = tmp_path / "outside", results / "gr2" / "tiny" / "stages"
    (outside / "key").mkdir(parents=True)
    (stages / "linked").symlink_to(outside)
    (stages / "sft" / "222222222222").symlink_to(outside / "key")
    other = run_folder(tmp_path / "elsewhere", "tiny", "other")
    assert "is not in" in refused("clean", "--runs", other, "--checkpoint_dir", results)
    printed("clean", "--yes", "--checkpoint_dir", results)
    assert (outside / "key").is_dir() and other.is_dir() and (stages / "sft" / "222222222222").is_symlink()


def test_clean_refuses_what_it_cannot_read(results):
    """Without the list of a run's stages it is unknown which of them are in use."""
    before = stage_paths(results)
    (find_run("latest", results) / "run.json").write_text("{")
    assert "run.json of the run" in refused("clean", "--yes", "--checkpoint_dir", results, code=1)
    assert stage_paths(results) == before


def test_clean_finishes_an_interrupted_removal(results):
    left = results / "gr2" / "tiny" / "stages" / "prior"
    (left / "000000000000").rename(left / ".removed-000000000000")
    text = printed("clean", "--yes", "--checkpoint_dir", results)
    assert ".removed-000000000000  unfinished" in text and not (left / ".removed-000000000000").exists()


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor(tmp_path, monkeypatch):
    argv = ["doctor", "--checkpoint_dir", tmp_path / "saved", "--json"]
    found = json.loads(printed(*argv))
    parts = {finding["part"] for finding in found}
    assert {"torch", "numpy", "recbole", "RecBole", "torch on the CPU", "GGUF", "data set ml-100k"} <= parts
    assert all(
        finding["state"] in ("ok", "warning") and (finding["do"] or finding["state"] == "ok") for finding in found
    )
    assert not (tmp_path / "saved").exists() and list(tmp_path.iterdir()) == []
    import importlib.metadata

    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0" if name == "torch" else version(name))
    argv = ["doctor", "--checkpoint_dir", "/dev/null/x", "--dataset=ml-100", "--data_path", tmp_path]
    code, stdout, _ = called(*argv)
    failed = [line for line in stdout.splitlines() if line.startswith("failed")]
    assert code == 1 and len(failed) == 3
    assert "torch: 1.0 is installed, >=2.6 is required" in failed[0]
    assert "cannot be written to" in failed[1] and "there is no data set 'ml-100'" in failed[2]


# --- list ------------------------------------------------------------------------------------------------------------


def listed(*argv) -> dict[str, str]:
    """The lines of a table by their first word."""
    return {line.split()[0]: line for line in printed("list", *argv).splitlines()[2:]}


def test_methods_are_listed():
    from recbole_gr2.rerankers.registry import ORDERS, RERANKERS

    methods = listed("methods")
    assert set(methods) == {*RERANKERS, *(order.name for order in ORDERS)}
    assert "LambdaMART" in methods["lambdamart"] and "part of every run" in methods["oracle"]


def test_data_sets_are_listed(tiny_data, tmp_path):
    data = listed("data", "--data_path", str(tiny_data))
    assert f"in {tiny_data}" in data["tiny"] and "part of RecBole" in data["ml-100k"]
    assert "RecBole downloads it" in data["amazon-beauty"] and "5-core" in data["amazon-beauty"]
    assert "settings only" in data["amazon-toys"] and "tiny" not in listed("data", "--data_path", str(tmp_path))


def test_settings_are_listed():
    settings = listed("settings")
    assert (
        len(settings) > 150 and "DAPO" in settings["rl_epsilon_high"] and "stage/rl.yaml" in settings["rl_epsilon_high"]
    )
    assert {"dataset", "user_inter_num_interval", "base_epochs", "base_n_heads"} <= set(settings)
    assert "epochs" not in settings and len(settings) > len(declarations())
    assert set(listed("settings", "rl_st")) == {"rl_start", "rl_steps", "onerec_think_rl_steps"}
    assert set(listed("settings", "rl_s*s")) == {"rl_steps"} | {
        key for key in settings if key.startswith("rl_s") and key.endswith("s")
    }


def test_presets_are_listed():
    presets = listed("presets")
    assert set(presets) == {"smoke", "quick", "laptop", "gpu", "paper"} and "llm: random" in presets["smoke"]
    assert "Two CPU cores" in presets["laptop"]
