"""The folder of a run: schema of result.json, tables, the page, LaTeX, and progress in a log."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from handmade import DESCRIPTIONS, DIAGNOSTIC, RANKS, STAGES, finished, recommender

from recbole_gr2 import console
from recbole_gr2.config import load_settings, properties_folder, read_yaml
from recbole_gr2.errors import MissingFileError
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.report import (
    build_result,
    latex_tables,
    learning_curves,
    metrics_table,
    new_folder,
    read_run,
    render_report,
    unchanged_methods,
    write_report,
    write_run,
)
from recbole_gr2.report.page import cautions
from recbole_gr2.report.tables import (
    PROTOCOL,
    comparisons_table,
    cost_table,
    curves_table,
    gap_closed,
    metrics_of,
    published_tables,
    scope_title,
    slices_table,
    truth_table,
)
from recbole_gr2.seeds import combine

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "result.schema.json").read_text())
FILES = {"config.yaml", "run.json", "result.json", "report.md", "report.html", "table.tex"}


def valid(result) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(result)


def piped(text: str) -> list[str]:
    """The lines of the first Markdown table of a text."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|"))
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))


def in_page(page: str, title: str) -> dict[str, list[str]]:
    """The cells of the first table of a section."""
    return cells("\n".join(piped(page.split(f"## {title}\n")[1])))


def cells(table: str) -> dict[str, list[str]]:
    """First cell of each line of a plain or Markdown table -> the other cells."""
    if table.lstrip().startswith("|"):
        lines = [re.split(r" \| ", line.strip().removeprefix("| ").removesuffix(" |")) for line in piped(table)[2:]]
        return {line[0]: [cell for cell in line[1:] if cell] for line in lines}
    lines = [re.split(r" {2,}", line.strip()) for line in table.strip("\n").splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def tabled(entries) -> dict:
    """A result of one seed with these (method, scope, NDCG@10, unchanged)."""
    methods = []
    for method, scope, ndcg, unchanged in entries:
        versus = {"ndcg@10": {"diff": ndcg - 0.5, "low": ndcg - 0.6, "high": ndcg - 0.4, "p": 0.5, "p_holm": 1.0}}
        methods.append(
            {
                "method": method,
                "description": method,
                "diagnostic": method in DIAGNOSTIC,
                "scope": scope,
                "n": [10],
                "metrics": {
                    "recall@1": {"mean": 0.25, "sd": None, "values": [0.25]},
                    "ndcg@10": {"mean": ndcg, "sd": None, "values": [ndcg]},
                },
                "unchanged": unchanged,
                "vs_base": {} if method == "base" else versus,
            }
        )
    return {"dataset": "x", "split": "test", "seeds": [1], "methods": methods, "comparisons": []}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one seed, and its result."""
    run = finished(tmp_path_factory.mktemp("one"), entries=[recommender(-0.05, 60)])
    return run, build_result([run], run.command)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a language model, and its result."""
    run = finished(tmp_path_factory.mktemp("plain"), llm=False)
    return run, build_result([run], run.command)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Runs of three seeds, and their result."""
    folder = tmp_path_factory.mktemp("three")
    other = {**RANKS, "sft": [1, 1, 2, 2, 2, 9]}
    runs = [
        finished(folder / str(seed), seed=seed, ranks=ranks, users=users, entries=[recommender(diff, 60)])
        for seed, ranks, users, diff in (
            (1, RANKS, "abcdef", -0.05),
            (2, other, "bcdefg", -0.03),
            (3, other, "cdefgh", -0.01),
        )
    ]
    return runs, combine(runs, "the command", 500)


# --- result.json -----------------------------------------------------------------------------------------------------


def test_results_have_the_documented_schema(one, plain, three):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for result in (one[1], plain[1], three[1]):
        jsonschema.validate(json.loads(json.dumps(result)), SCHEMA, cls=jsonschema.Draft202012Validator)
        assert result["schema"] == 2
        for entry in (*result["methods"], *result["stages"]):
            counts = {len(value) for value in entry.values() if isinstance(value, list)}
            assert counts == {len(result["seeds"])}
            assert {len(figure["values"]) for figure in entry.get("metrics", {}).values()} <= counts


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"rows": []},
        {"seeds": []},
        {"seeds": 2020},
        {"tokenizer": {"uniqueness": 1.0}},
        {"stages": []},
        {"settings": {"seed": 5}},
        {"methods": [{"method": "base"}]},
    ],
)
def test_the_schema_refuses_other_results(one, change):
    assert valid(one[1]) and not valid({**one[1], **change})


def test_the_schema_refuses_other_entries(one):
    first = one[1]["methods"][1]
    for change in (
        {"scope": "in_list"},
        {"n": 10},
        {"unchanged": 1.5},
        {"metrics": {"recall@1": 0.5}},
        {"vs_base": {"recall@1": {"low": 0.0}}},
        {"vs_base": {"recall@1": {"diff": 0.0, "low": 0.0}}},
        {"vs_base": {"recall@1": {"diff": 0.0, "low": 0.0, "high": 0.0, "p": 0}}},
        {"row": "x"},
    ):
        assert valid({**one[1], "methods": [first]}) and not valid({**one[1], "methods": [{**first, **change}]})


def test_every_field_of_the_schema_is_described():
    described = set()

    def walk(node):
        if isinstance(node, dict):
            for name, field in node.get("properties", {}).items():
                definition = SCHEMA["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
                if name != "variants":
                    assert "description" in field or "description" in definition, name
                described.add(name)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(SCHEMA)
    assert {"methods", "vs_base", "p_holm", "figures"} <= described


def test_result_of_one_seed(one):
    run, result = one
    assert (result["dataset"], result["base_model"], result["llm"]) == ("ml-100k", "SASRec", "random")
    assert (result["preset"], result["seeds"], result["command"]) == ("smoke", [2020], run.command)
    assert result["runs"] == [str(run.path)] and result["settings"] == run.settings
    assert result["tokenizer"] == {"uniqueness": [1.0]}
    entries = run.evaluation.summary["methods"]
    assert [(e["method"], e["scope"]) for e in result["methods"]] == [(e["method"], e["scope"]) for e in entries]
    for ours, theirs in zip(result["methods"], entries, strict=True):
        assert ours["n"] == [theirs["n"]] and ours["vs_base"] == theirs["vs_base"]
        assert ours["unchanged"] == theirs["unchanged"] and ours["description"] == theirs["description"]
        for metric, value in theirs["metrics"].items():
            assert ours["metrics"][metric] == {"mean": value, "sd": None, "values": [value]}
    assert result["comparisons"] == run.evaluation.summary["comparisons"]
    assert result["truth"] == run.evaluation.summary["truth"]
    assert result["curves"] == learning_curves(run.folders)
    assert [stage["stage"] for stage in result["stages"]] == list(run.folders)
    assert result["stages"][1] == {
        "stage": "tokenizer",
        "key": ["tokenizer-2020"],
        "seconds": [2030.0],
        "peak_memory_mb": [101],
        "cached": [False],
        "code": ["1.0 abc"],
    }


def test_several_runs_need_comparisons_of_their_own(three):
    with pytest.raises(ValueError, match="several runs"):
        build_result(three[0], "")


def test_settings_that_differ_between_seeds_are_left_out(one):
    run, _ = one
    other = replace(run, seed=1, settings={**run.settings, "sid_epochs": {"value": 1, "from": "x"}})
    assert build_result([other, run], "", vs_base={}, comparisons=[])["settings"] == run.settings


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_seed_and_several_write_the_same_files(one, three, tmp_path, capsys):
    for name, runs, result in (("one", [one[0]], one[1]), ("three", *three)):
        (tmp_path / name).mkdir()
        path = write_report(tmp_path / name, result, runs, console.Console())
        assert {file.name for file in path.parent.iterdir()} == FILES
        assert json.loads(path.read_text()) == result
        assert (path.parent / "report.md").read_text() == render_report(result, runs)
        assert (path.parent / "table.tex").read_text() == latex_tables(result)
        printed = capsys.readouterr()
        for scope in ("all_users", "hit_users"):
            assert f"{scope_title(result, scope)}\n{metrics_table(result, scope)}\n" in printed.err
        assert "report.html" in printed.err and printed.out == ""
    run = json.loads((tmp_path / "three" / "run.json").read_text())
    assert run == {"command": "the command", "runs": [str(each.path) for each in three[0]]}
    assert read_yaml((tmp_path / "three" / "config.yaml").read_text()) == {
        "preset": "smoke",
        "dataset": "ml-100k",
        "seed": 1,
    }
    assert "--seeds 1,2,3" in (tmp_path / "three" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_is_read_from_its_files(one, three, tmp_path):
    """The report is a function of what the stages wrote."""
    run, result = one
    write_report(run.path.parent, result, [run], console.Console())
    again = read_run(run.path)
    assert again == run and build_result([again], run.command) == result
    assert render_report(result, [again]) == (run.path.parent / "report.md").read_text()
    (run.folders["prior"] / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(MissingFileError, match="no finished prior any more"):
        read_run(run.path)
    (tmp_path / "manifest.json").rename(run.folders["prior"] / "manifest.json")


@pytest.mark.slow
def test_the_run_of_a_plan(one, tmp_path, capsys):
    run, _ = one
    settings = load_settings(config_dict={"preset": "smoke", "checkpoint_dir": str(tmp_path), "seed": 2020})
    planned = [SimpleNamespace(stage=SimpleNamespace(name=name), folder=path) for name, path in run.folders.items()]
    done = list(zip(run.records, run.cached, strict=True))
    path = write_run(planned, done, settings, "the command", console.Console())
    assert path.parent.parent == tmp_path / "gr2" / settings["dataset"] / "runs"
    result = json.loads(path.read_text())
    assert valid(result) and result["seeds"] == [2020] and result["runs"] == [str(path)]
    assert load_settings(config_files=[path.parent / "config.yaml"])["checkpoint_dir"] == str(tmp_path)
    assert {
        stage: Path(folder) for stage, folder in json.loads((path.parent / "run.json").read_text())["stages"].items()
    } == (run.folders)


def test_folders_of_the_same_second_have_different_names(tmp_path):
    folders = {new_folder(tmp_path / "runs") for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_gap_closed_comes_from_exact_differences(one, three):
    """RecBole rounds its metrics. Over many users little is left of the difference of two rounded ones."""
    for runs, result in (([one[0]], one[1]), three):
        for scope in ("all_users", "hit_users"):
            ranks = {m: np.concatenate([run.per_user()[m].to_numpy() for run in runs]) for m in ("base", "sft")}
            base, sft = (ndcg_at(each, 10).sum() for each in ranks.values())
            shares = gap_closed(result, scope)
            assert shares["oracle"] == 1.0
            assert shares["sft"] == pytest.approx((sft - base) / (len(ranks["base"]) - base), abs=1e-12)
            oracle = cells(metrics_table(result, scope))["oracle"]
            assert oracle[-2] == "+100.0%"


def test_gap_closed_of_a_small_gap(tmp_path):
    """The rounded metrics of base and oracle are equal, the shares are exact nevertheless."""
    run = finished(tmp_path, everyone=1_000_000)
    result = build_result([run], "")
    base, oracle = (entry["metrics"]["ndcg@10"]["mean"] for entry in result["methods"][:2])
    assert base == oracle and gap_closed(result, "all_users") == pytest.approx(gap_closed(result, "hit_users"))


def test_gap_closed_without_a_gap(tmp_path):
    ranks = {method: [1] * 6 for method in ("base", "oracle", "sft")}
    result = build_result([finished(tmp_path, ranks=ranks)], "")
    assert gap_closed(result, "hit_users") == {}
    assert unchanged_methods(result) == ["sft"]
    assert "These methods returned every candidate list unchanged: sft." in cautions(result)


def test_metrics_table_of_one_seed(one):
    _, result = one
    lines = cells(metrics_table(result, "all_users"))
    assert list(lines) == [*RANKS, "SASRec"]
    header = metrics_table(result, "all_users").splitlines()[0]
    assert re.split(r" {2,}", header.strip())[1:5] == ["recall@1", "recall@5", "ndcg@5", "ndcg@10"]
    assert lines["SASRec"][:4] == ["0.1000"] * 4
    assert lines["SASRec"][4:6] == ["-0.0500 [-0.1500, +0.0500]", "1.0000"]
    assert (
        lines["SASRec"][-1].endswith("%") and len(lines["SASRec"]) == 7
    )  # a share of the gap, none of unchanged lists
    assert len(lines["base"]) == 5 and lines["base"][-1] == "100.0%"
    assert "SASRec" not in cells(metrics_table(result, "hit_users"))
    assert scope_title(result, "all_users") == "ml-100k, all users, n = 60"


def test_metrics_table_of_several_seeds(three):
    runs, result = three
    lines = cells(metrics_table(result, "hit_users"))
    values = [(run.per_user()["sft"] == 1).mean() for run in runs]
    mean, sd = np.mean(np.round(values, 4)), np.std(np.round(values, 4), ddof=1)
    assert lines["sft"][0] == f"{mean:.4f} ± {sd:.4f}"
    everyone = cells(metrics_table(result, "all_users"))
    assert everyone["SASRec"][4] == "-0.0300" and everyone["SASRec"][5].endswith("%")  # no interval, no p-value
    assert scope_title(result, "hit_users") == "ml-100k, hit users, n = 6"


def test_tables_have_the_metrics_of_the_run():
    result = tabled(
        [("base", "hit_users", 0.5, 1.0), ("oracle", "hit_users", 1.0, 0.1), ("sft", "hit_users", 0.6, 0.2)]
    )
    for entry in result["methods"]:
        hit, map_ = entry["metrics"]["recall@1"], entry["metrics"]["ndcg@10"]
        entry["metrics"] = {"hit@5": map_, "hit@2": hit, "precision@2": hit, "map@2": map_}
    shown, equal = metrics_of(result, "hit_users")
    assert shown == ["hit@5", "hit@2"] and equal == {"precision@2": "hit@2", "map@2": "hit@5"}
    header = metrics_table(result, "hit_users").splitlines()[0].split()
    assert header[1:3] == ["hit@5", "hit@2"] and "recall@1" not in header


def test_unchanged_methods_and_methods_without_lists():
    result = tabled(
        [
            ("base", "hit_users", 0.5, 1.0),
            ("oracle", "hit_users", 1.0, 1.0),
            ("sft", "hit_users", 0.5, 1.0),
            ("rl", "hit_users", 0.5, 0.5),
            ("SASRec", "hit_users", 0.5, None),
        ]
    )
    assert unchanged_methods(result) == ["sft"]
    lines = cells(metrics_table(result, "hit_users"))
    assert lines["SASRec"][-1] == "+0.0%" and lines["sft"][-1] == "100.0%"


def test_comparisons_table(one):
    compared = {
        "recall@1": {"diff": 0.0125, "low": -0.001, "high": 0.0234, "p": 0.04, "p_holm": 0.08},
        "ndcg@10": {"diff": -0.5, "low": -0.6, "high": -0.4, "p": 0.0001, "p_holm": 0.0002},
    }
    pair = {"method": "sft", "versus": "prior", "scope": "hit_users", "metrics": compared}
    table = comparisons_table({"methods": [], "comparisons": [pair]})
    assert table.split("  ")[0] == "methods"
    assert cells(table)["sft - prior"] == [
        "+0.0125 [-0.0010, +0.0234]",
        "0.0800",
        "-0.5000 [-0.6000, -0.4000]",
        "0.0002",
    ]
    names = list(cells(comparisons_table(one[1])))
    assert names == ["prior - base", "sft - base", "sft - prior", "sft - shuffled"]
    assert (
        len(cells(comparisons_table(one[1]))["sft - shuffled"]) == 2
    )  # no adjusted p-value against a diagnostic method


def test_slices_by_hand(one):
    run, _ = one
    frame = run.per_user().assign(base=[1, 2, 3, 4, 6, 9], sft=[1, 1, 4, 6, 2, 5])
    lines = cells(slices_table([frame], ["base", "sft", "SASRec"]))
    assert lines["base rank 1"] == ["1", "1.0000", "1.0000"]
    assert lines["base rank 2 to 3"] == ["2", f"{(1 / np.log2(3) + 0.5) / 2:.4f}", f"{(1 + 1 / np.log2(5)) / 2:.4f}"]
    assert lines["base rank 4"] == ["1", f"{1 / np.log2(5):.4f}", f"{1 / np.log2(7):.4f}"]
    assert lines["base rank 6 to 9"][:2] == ["2", f"{(1 / np.log2(7) + 1 / np.log2(10)) / 2:.4f}"]
    assert lines["history items 2"][0] == "2"
    assert not any(name.startswith("target interactions") for name in lines)  # equal for all users: no parts
    twice = cells(slices_table([frame, frame], ["base", "sft"]))
    assert twice["base rank 1"] == ["2", "1.0000", "1.0000"]


def test_cost_table(three, one):
    lines = cells(cost_table(three[1]))
    assert lines["tokenizer"] == ["11 s", "12 s", "13 s", "101 MiB", "1.0 abc"]
    assert lines["embeddings"] == ["1 s", "2 s", "3 s", "100 MiB", "yes", "1.0 abc"]
    totals = [sum(stage["seconds"][n] for stage in three[1]["stages"]) for n in range(3)]
    assert lines["all"] == [f"{total:,.0f} s" for total in totals]
    mixed = {**three[1], "stages": [{**three[1]["stages"][0], "cached": [True, False, True]}]}
    assert cells(cost_table(mixed))["embeddings"][4] == "2 of 3"
    assert cost_table(one[1]).splitlines()[0].split()[:3] == ["stage", "wall", "time"]


def test_published_figures_have_known_metrics_ranges_and_sources():
    figures = read_yaml((properties_folder() / "published.yaml").read_text(encoding="utf-8"))
    sources = figures.pop("sources")
    assert set(figures) == {"amazon-beauty", "amazon-sports", "amazon-toys"}
    assert {scope for scopes in figures.values() for scope in scopes} == {"all_users", "hit_users"}
    entries = [(scope, entry) for scopes in figures.values() for scope, rows in scopes.items() for entry in rows]
    assert {entry["source"] for _, entry in entries} == set(sources)
    assert {entry.get("mask", "yes") for _, entry in entries} == {"yes"}
    assert {entry.get("fit", "n-2") for _, entry in entries} == {"n-2"}
    known = {"recall@1", "recall@3", "recall@5", "recall@10", "ndcg@5", "ndcg@10"}
    values = [(scope, name, value) for scope, entry in entries for name, value in entry.items() if name not in PROTOCOL]
    assert len(values) > 60 and {name for _, name, _ in values} <= known
    assert all((0.2 if scope == "hit_users" else 0) < value < 1 for scope, _, value in values)


def test_the_protocol_is_listed(one):
    run, result = one
    page = render_report(result, [run])
    assert "## Protocol\n\n- split: leave-one-out in time order\n- items of the history: excluded\n" in page


def test_published_figures_are_shown_for_their_data_set_alone(one):
    run, result = one
    tables, sources = published_tables("amazon-beauty")
    assert "RL, rejection, KP" in tables["hit_users"] and "0.5234" in tables["hit_users"]
    header = ["method", "source", "mask", "fit", "recall@1", "recall@3", "recall@5", "ndcg@5", "ndcg@10"]
    assert tables["hit_users"].splitlines()[0].split() == header
    assert "arXiv 2311.02089" in sources["LlamaRec"]
    assert published_tables("ml-100k") == ({}, {}) and "for reference" not in render_report(result, [run])
    beauty = {**result, "dataset": "amazon-beauty"}
    page = render_report(beauty, [run])
    assert "for reference" in page and f"- LlamaRec: {sources['LlamaRec']}." in page
    split = {"eval_args": {"value": {"split": {"RS": [8, 1, 1]}, "order": "TO"}, "from": "command line"}}
    assert "for reference" not in render_report({**beauty, "settings": split}, [run])


# --- report.md -------------------------------------------------------------------------------------------------------


def test_the_page_of_one_seed(one):
    run, result = one
    page = render_report(result, [run])
    for text in (
        "# GR2 on ml-100k",
        "preset smoke, seed 2020.",
        f"    {run.command}",
        metrics_table(result, "all_users", console.pipe_table),
        metrics_table(result, "hit_users", console.pipe_table),
        comparisons_table(result, console.pipe_table),
        slices_table([run.per_user()], ["base", "prior", "sft"], console.pipe_table),
        truth_table(result, console.pipe_table),
        curves_table(result["curves"], console.pipe_table),
        cost_table(result, console.pipe_table),
        "valid/u7, target from 2 to 1.",
        "- These are results of one seed.",
        "- There are only 6 hit users.",
        "| sft_steps | 5 | command line |",
        "Uniqueness 100.0000% (75.00% by nearest codes alone), largest collision 2, codes in use [8, 7]",
        "2 of 90 items have no text",
        "2 features of each candidate: score, popularity. Steps of the fits, chosen on validation lists: 20, 30.",
        "900 of 1,200 train lists have an accepted trace (75.0%), after 1.5 tries on average. 50.0% cite their first",
        "The prompt contains 25.0% of 2,000 cited IDs. Reasons of rejection: no reasoning (30). Cost: 1,234.50.",
    ):
        assert " ".join(text.split()) in " ".join(page.split()), text
    for method, description in DESCRIPTIONS.items():
        assert page.count(f"- `{method}`: {description}") == 1
    answers = in_page(page, "Answers")
    assert answers["sft"] == [
        *("87.5%", "ok 5, repaired 1", "40.5", "25.0%", "35.0%", "45.0%", "30.0%", "70.0%", "2.5"),
        *("1:4 3:2", "2:6"),
    ]
    lists = in_page(page, "Candidates")
    assert lists == {"train": ["1,200", "0.2500"], "test": ["60", "0.1250"]}
    assert in_page(page, "Reinforcement learning") == {"rl": ["12", "300"]}
    assert in_page(page, "Prior") == {"valid": ["12", "0.5000", "0.2500"]}


def test_the_page_without_a_language_model(plain):
    page = render_report(plain[1], [plain[0]])
    titles = re.findall(r"^## (.*)", page, re.MULTILINE)
    assert titles[2:] == [
        "Protocol",
        "Differences between methods",
        "Slices",
        "Rank before and after",
        "Candidates",
        "Semantic IDs",
        "Prior",
        "Settings",
        "Cost",
    ]


def test_the_page_of_several_seeds(three):
    runs, result = three
    page = render_report(result, runs)
    for text in (
        "seeds 1, 2, 3.",
        "Metrics are means over the seeds",
        metrics_table(result, "hit_users", console.pipe_table),
        comparisons_table(result, console.pipe_table),
        curves_table(result["curves"], console.pipe_table),
        cost_table(result, console.pipe_table),
        "Seed 2: 900 of 1,200 train lists",
        "Runs: seed-1, seed-2, seed-3.",
    ):
        assert text in page
    assert "one seed" not in page and "of all seeds" in page
    lines = piped(page.split("## Candidates")[1])
    assert lines[-1] == "| 3 | test | 60 | 0.1250 |" and lines[0] == "| seed | split | lists | recall@1 |"
    lines = piped(page.split("## Answers")[1])[2:]
    assert [line[:17] for line in lines] == [f"| {seed} | sft | 87.5%" for seed in (1, 2, 3)]


def test_sections_do_not_depend_on_names_of_stages(one, tmp_path):
    """Sections about stages follow the fields of their summaries. Other stages do not matter."""
    run, result = one
    names = {record.stage: f"my_{record.stage}" for record in run.records}
    renamed = replace(
        run,
        records=tuple(replace(record, stage=names[record.stage]) for record in run.records),
        folders={names[stage]: folder for stage, folder in run.folders.items()},
    )
    page, again = render_report(result, [run]), render_report(build_result([renamed], run.command), [renamed])
    assert re.findall(r"^## (.*)", again, re.MULTILINE) == re.findall(r"^## (.*)", page, re.MULTILINE)
    extra = {"mine": {"stats": 5, "quality": "good", "requests": [], "uniqueness": "high", "rounds": 3}, "empty": {}}
    other = finished(tmp_path, stages=extra)
    other_page = render_report(build_result([other], run.command), [other])
    assert re.findall(r"^## (.*)", other_page, re.MULTILINE) == re.findall(r"^## (.*)", page, re.MULTILINE)
    assert STAGES.keys() < other.folders.keys()


def test_cautions_name_unclear_methods():
    result = tabled(
        [("base", "hit_users", 0.5, 1.0), ("oracle", "hit_users", 1.0, 0.1), ("sft", "hit_users", 0.55, 0.2)]
    )
    assert cautions(result)[-1] == "The interval of the ndcg@10 difference to base contains 0 for: sft."
    for entry in result["methods"]:
        entry["n"] = [5000, 4000]
    clear = {**result, "seeds": [1, 2], "methods": result["methods"][:2]}
    assert cautions(clear) == []


def test_learning_curves(one, tmp_path):
    curves = one[1]["curves"]
    assert curves["sft"] == {"loss": [3.0, 1.0]}
    assert curves["rl"] == {"reward": [1.0, 2.0, 3.0], "unchanged": [0.5] * 3, "reward/ndcg": [0.25] * 3}
    assert cells(curves_table(curves))["sft"] == ["loss", "3.0000", "1.0000"]
    logs = {
        "two": [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 9.0), (1, 3.0), (2, 1.0))],
        "parts": {"first": [{"step": 1, "loss/a": 2.0}], "second": [{"step": 1, "loss": 1.0}]},
        "other": [["not", "a", "training", "log"]],
        "number": 5,
        "none": [],
    }
    for name, log in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.json").write_text(json.dumps(log))
    assert learning_curves({name: tmp_path / name for name in (*logs, "missing")}) == {
        "two": {"loss": [3.0, 1.0]},  # the last training of the stage
        "parts first": {"loss/a": [2.0]},
        "parts second": {"loss": [1.0]},
    }
