"""Ablations: what is refused before anything runs, what is cached, and what the table says."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.ablation import data_for, figure, figures_table, load_variant, read_ablation, render_ablation
from recbole_gr2.config import load_settings, properties_folder
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.quick_start import main
from recbole_gr2.stages import tokenizer
from recbole_gr2.store import read_manifest

TWO = {
    "stages": ["tokenizer"],
    "settings": {"sid_epochs": 1, "sid_min_unique": 0.0},
    "columns": {
        "unique": "tokenizer.uniqueness",
        "codes": "tokenizer.used_codes",
        "last": "tokenizer.entropy.3",
        "none": "tokenizer.neighbourhood.same_path.3",
    },
    "variants": [
        {"name": "nearest", "settings": {"sid_random_last": 0}},
        {"name": "drawn", "published": {"unique": 0.83}},
    ],
    "note": "What a reader has to know.",
}


@pytest.fixture
def command(tmp_path):
    """command(file's values, further words): the argv of such an ablation, in a folder of its own."""

    def build(values=TWO, *words):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["--ablation", str(file), "--preset=smoke", f"--checkpoint_dir={tmp_path / 'saved'}", *words]

    return build


def changed(**fields):
    return {**TWO, **fields}


def manifests(tmp_path) -> dict[Path, int]:
    """Every finished tokenizer stage, and when it was finished."""
    stage = tmp_path / "saved" / "gr2" / "ml-100k" / "stages" / "tokenizer"
    return {file: file.stat().st_mtime_ns for file in stage.glob("*/manifest.json")}


# --- what is run -----------------------------------------------------------------------------------------------------


def test_two_variants_in_one_table_and_the_second_run_is_all_cached(command, tmp_path, capsys):
    assert main(command()) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.name == "result.json" and path.parent.parent == tmp_path / "saved" / "gr2" / "ml-100k" / "ablations"
    result, before = json.loads(path.read_text()), manifests(tmp_path)
    assert len(before) == 2
    records = {file.parent.name: read_manifest(file.parent) for file in before}
    nearest, drawn = result["variants"]
    for row, random_last in ((nearest, 0), (drawn, 1)):
        record = records[row["keys"]["tokenizer"]]
        facts = record.facts
        assert record.settings["sid_random_last"] == random_last and record.settings["sid_epochs"] == 1
        assert row["figures"] == {
            "unique": facts["uniqueness"],
            "codes": facts["used_codes"],
            "last": facts["entropy"][3],
            "none": None if random_last else facts["neighbourhood"]["same_path"][3],
        }
        assert list(row["seconds"]) == ["embeddings", "tokenizer"] and row["failed"] == ""
        assert row["seconds"]["tokenizer"] == record.seconds
    assert nearest["keys"]["embeddings"] == drawn["keys"]["embeddings"]
    assert nearest["figures"]["unique"] < drawn["figures"]["unique"] == 1.0

    header, _rule, *lines = figures_table(result).splitlines()
    assert header.split() == ["variant", "unique", "codes", "last", "none", "published:", "unique"]
    assert [line.split()[0] for line in lines] == ["nearest", "drawn"]
    assert lines[0].split()[1] == f"{nearest['figures']['unique']:.4f}" and lines[0].split()[-1] != "0.8300"
    assert lines[1].split()[1] == "1.0000" and lines[1].split()[-1] == "0.8300"
    report = (path.parent / "report.md").read_text()
    assert report == render_ablation(result)  # a function of result.json
    for text in (figures_table(result), result["command"], TWO["note"], "Preset smoke, seed 2020", "random_last: 0"):
        assert text in report
    assert "Failed" not in report and f"{nearest['seconds']['tokenizer']:.0f} s" in report

    assert main(command()) == 0
    captured = capsys.readouterr()
    again = Path(captured.out.splitlines()[-1])
    assert again != path and json.loads(again.read_text()) == result
    assert manifests(tmp_path) == before and captured.err.count("tokenizer cached") == 2


def test_a_stopped_ablation_goes_on(command, tmp_path, capsys, monkeypatch):
    calls = []

    def stop_at_the_second(*given, fit=tokenizer.fit):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*given)

    monkeypatch.setattr(tokenizer, "fit", stop_at_the_second)
    assert main(command()) == 130
    assert "the same command continues" in capsys.readouterr().err and len(manifests(tmp_path)) == 1
    assert main(command()) == 0
    captured = capsys.readouterr()
    assert len(calls) == 3 and "stopped before it was finished" in captured.err
    rows = json.loads(Path(captured.out.splitlines()[-1]).read_text())["variants"]
    assert [row["figures"]["unique"] is None for row in rows] == [False, False]


def test_what_two_variants_share_runs_once(command, tmp_path, capsys):
    values = changed(variants=[{"name": "one"}, {"name": "two"}])
    assert main(command(values, "--dry_run")) == 0
    captured = capsys.readouterr()
    plan = [line.split() for line in captured.err.splitlines() if line.startswith(("one", "two"))]
    assert [[*row[:2], *row[3:]] for row in plan] == [
        ["one", "embeddings", "run", "first", "time"],
        ["one", "tokenizer", "run", "first", "time"],
        ["two", "embeddings", "shared", "one"],
        ["two", "tokenizer", "shared", "one"],
    ]
    assert [row[2] for row in plan[:2]] == [row[2] for row in plan[2:]]
    assert captured.out == "" and not (tmp_path / "saved").exists()
    assert main(command(values)) == 0
    captured = capsys.readouterr()
    assert captured.err.count("texts embedded") == 1 and len(manifests(tmp_path)) == 1


def test_a_variant_that_fails_its_gate_keeps_its_row_and_the_others_stand(command, tmp_path, capsys):
    values = changed(settings={"sid_epochs": 1, "sid_min_unique": 0.99})
    assert main(command(values)) == 0
    captured = capsys.readouterr()
    path = Path(captured.out.splitlines()[-1])
    result, report = json.loads(path.read_text()), (path.parent / "report.md").read_text()
    nearest, drawn = result["variants"]
    assert "below 99.00%" in nearest["failed"] and drawn["failed"] == ""
    assert set(nearest["figures"].values()) == {None} and nearest["seconds"]["tokenizer"] is None
    assert drawn["figures"]["unique"] == 1.0
    assert "nearest (failed)" in figures_table(result) and "drawn (failed)" not in figures_table(result)
    assert "`nearest` failed" in report and "below 99.00%" in report and "variant 'nearest' failed" in captured.err


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(argv, tmp_path, capsys) -> str:
    """What the command says; it leaves nothing behind."""
    assert main(argv) == 2
    assert not (tmp_path / "saved").exists()
    return capsys.readouterr().err


def test_all_variants_are_checked_before_any_runs(command, tmp_path, capsys):
    said = refused(
        command(
            changed(
                variants=[
                    {"name": "fine"},
                    {"name": "misspelt", "settings": {"sid_epoch": 2}},
                    {"name": "out of range", "settings": {"sid_random_last": 9}},
                    {"name": "no loss", "settings": {"sid_method": "rqkmeans", "sid_diversity": 0.1}},
                    {"name": "no model", "settings": {"models": ["Nonsense"]}},
                ]
            )
        ),
        tmp_path,
        capsys,
    )
    for text in (
        "'misspelt'",
        "unknown key 'sid_epoch'; nearest: sid_epochs",
        "'out of range'",
        "random_last must be",
        "'no loss'",
        "rqkmeans is not trained by a loss",
        "'no model'",
        "Nonsense",
    ):
        assert text in said
    assert "'fine'" not in said


def test_a_common_setting_that_is_wrong_is_told_once(command, tmp_path, capsys):
    said = refused(command(changed(settings={"sid_epoch": 2})), tmp_path, capsys)
    assert said.count("unknown key 'sid_epoch'") == 1 and "ablation mine: unknown key" in said
    said = refused(command(changed(stages=["tokeniser"])), tmp_path, capsys)
    assert said.count("no stage named 'tokeniser'") == 1 and "'nearest', 'drawn'" in said


def test_the_user_cannot_give_what_a_variant_varies(command, tmp_path, capsys):
    said = refused(command(TWO, "--sid_random_last=2"), tmp_path, capsys)
    assert "'nearest': the variant sets sid_random_last to 0, the command line to 2" in said and "'drawn'" not in said
    file = tmp_path / "user.yaml"
    file.write_text("sid_random_last: 2")
    said = refused(command(TWO, f"--config_files={file}"), tmp_path, capsys)
    assert f"the variant sets sid_random_last to 0, the {file} to 2" in said
    assert main(command(TWO, "--sid_random_last=0", "--dry_run")) == 0


def test_an_ablation_chooses_its_stages(command, tmp_path, capsys):
    for word in ("--stages=tokenizer", "--from_stage=tokenizer", "--force"):
        assert "an ablation chooses its own stages" in refused(command(TWO, word), tmp_path, capsys)


def test_columns_are_of_stages_that_run_and_of_facts_that_are_there(command, tmp_path, capsys):
    one = [{"name": "only"}]
    said = refused(command(changed(variants=one, columns={"x": "sft.loss"})), tmp_path, capsys)
    assert "no variant runs: {'x': 'sft.loss'}" in said
    assert main(command(changed(variants=one, columns={"x": "tokenizer.unique"}))) == 2
    said = capsys.readouterr().err
    assert "'unique' is not in what the tokenizer stage says" in said and "'uniqueness'" in said


@pytest.mark.parametrize(
    "broken, said",
    [
        ({"stage": []}, "unexpected keyword argument 'stage'"),
        ({"stages": "tokenizer"}, "stages must be a list"),
        ({"settings": ["sid_epochs"]}, "must be maps"),
        ({"variants": []}, "name of its own"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        ({"variants": [{"settings": {}}]}, "missing 1 required keyword-only argument: 'name'"),
        ({"variants": [{"name": "a", "settings": None}]}, "must be maps"),
        ({"variants": [{"name": "a", "published": {"b": 1}}]}, "published figures must be of columns"),
        ({"variants": None}, "cannot read the ablation"),
    ],
)
def test_a_file_that_is_not_an_ablation(tmp_path, broken, said):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**changed(variants=[{"name": "a"}]), **broken}))
    with pytest.raises(ConfigurationError, match=said):
        read_ablation(str(file))


def test_an_ablation_that_is_not_there():
    with pytest.raises(ConfigurationError, match="no ablation named 'everything'") as error:
        read_ablation("everything")
    assert "tokenizer" in error.value.do
    with pytest.raises(MissingFileError, match="nowhere.yaml"):
        read_ablation("nowhere.yaml")


# --- settings, data, figures -----------------------------------------------------------------------------------------


def test_precedence(command, tmp_path):
    """Preset, common settings, variant, --config_files, config_dict, command line: each wins over those before it."""
    command(changed(settings={"sid_epochs": 1}))
    mine, user = read_ablation(str(tmp_path / "mine.yaml")), tmp_path / "user.yaml"
    nearest, drawn = mine.variants

    def epochs(variant=drawn, words="", **given):
        user.write_text(words)
        given["config_dict"] = {"preset": "smoke", **given.get("config_dict", {})}
        return load_variant(mine, variant, {**given, "config_files": [user]})["sid_epochs"]

    assert load_settings(config_dict={"preset": "smoke"})["sid_epochs"] == 20
    assert epochs() == 1
    nearest.settings["sid_epochs"] = 2
    assert epochs(nearest) == 2
    assert epochs(words="sid_epochs: 3") == 3
    assert epochs(words="sid_epochs: 3", config_dict={"sid_epochs": 4}) == 4
    assert epochs(config_dict={"sid_epochs": 4}, command_line={"sid_epochs": 5}) == 5


def test_data_is_loaded_again_only_where_it_differs():
    def chosen(**changes):
        return load_settings(config_dict={"preset": "smoke", **changes})

    data = data_for(chosen())
    same = data_for(chosen(sid_epochs=1, cand_num=5), data)
    assert same.dataset is data.dataset and same.settings["cand_num"] == 5 and data.settings["cand_num"] == 10
    assert same.fingerprint == data.fingerprint
    assert data_for(chosen(topk=[2]), data).config["topk"] == [2]
    assert data_for(chosen(text_categories=None), data).fingerprint != data.fingerprint


NAMES = st.text("abc@1", min_size=1, max_size=3)
FACTS = st.recursive(
    st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def paths(value, before):
    yield before, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, f"{before}.{key}")


@given(FACTS)
def test_every_path_leads_to_its_fact(facts):
    for path, value in paths(facts, "stage"):
        assert figure({"stage": facts, "other": {}}, path) == value


def test_where_nothing_was_measured():
    facts = {"TIGER": {"metrics": {"recall@10": 0.06}, "valid": None, "rows": [1], "table": [{"row": "a"}]}}
    assert figure(facts, "TIGER.metrics.recall@10") == 0.06
    for path in (
        "sft.loss",
        "TIGER.valid",
        "TIGER.valid.loss",
        "TIGER.rows.1",
        "TIGER.table.row=b.n",
        "TIGER.table.row=a&scope=all",
    ):
        assert figure(facts, path) is None
    for path in ("TIGER.loss", "TIGER.metrics.recall@5", "TIGER.rows.first", "TIGER.metrics.recall@10.x"):
        with pytest.raises(ConfigurationError, match="no fact"):
            figure(facts, path)


# --- packaged ablations ----------------------------------------------------------------------------------------------

PACKAGED = sorted(file.stem for file in (properties_folder() / "ablation").glob("*.yaml"))


def test_there_are_packaged_ablations():
    assert "tokenizer" in PACKAGED


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_ablations_can_be_planned(name, tmp_path, capsys):
    """Settings, stages and the stages of columns are checked by the plan; no two variants are the same run."""
    assert main(["--ablation", name, "--preset=smoke", f"--checkpoint_dir={tmp_path / 'saved'}", "--dry_run"]) == 0
    said = capsys.readouterr().err
    shared = [line for line in said.splitlines() if " shared " in line]
    mine = read_ablation(name)
    assert " run " in said and mine.note and not any(f" {mine.stages[-1]} " in line for line in shared)


@pytest.mark.parametrize("name", ["rerank", "reward"])
def test_the_columns_of_packaged_ablations_are_facts_of_a_run(smoke_run, name):
    facts = {stage: read_manifest(folder).facts for stage, folder in smoke_run.stages.items()}
    found = {heading: figure(facts, path) for heading, path in read_ablation(name).columns.items()}
    assert len(found) > 10 and None not in found.values()
    curves = [value for value in found.values() if isinstance(value, list)]
    assert len(curves) == (4 if name == "reward" else 0) and all(len(curve) == 3 for curve in curves)  # three rounds


def test_the_tokenizer_ablation_names_what_it_shows():
    mine = read_ablation("tokenizer")
    smoke = {"config_dict": {"preset": "smoke"}}
    chosen = {v.name: load_variant(mine, v, smoke).results(["sid_"]) for v in mine.variants}
    plain = load_settings(**smoke, layers={"": mine.settings}).results(["sid_"])
    off = {
        "sid_kmeans_init": False,
        "sid_ema": False,
        "sid_diversity": 0.0,
        "sid_reset_after": 0,
        "sid_random_last": 0,
        "sid_contrastive": 0.0,
    }
    (default,) = [name for name in chosen if name.startswith("default (")]
    assert chosen[default] == load_settings(**smoke).results(["sid_"]) | {"sid_min_unique": 0.0}
    assert chosen["all off"] == {**plain, **off}

    def differs(one, two):
        return {key.removeprefix("sid_") for key in plain if chosen[one][key] != chosen[two][key]}

    ladder = list(chosen)[: list(chosen).index(default) + 1]
    steps = ["kmeans_init", "ema", "reset_after", "random_last", "random_mode", "contrastive"]
    assert [differs(*pair) - {"random_mode"} or {"random_mode"} for pair in itertools.pairwise(ladder)] == [
        {step} for step in steps
    ]
    alone = {
        "no contrastive, diversity": "diversity",
        "no contrastive, no k-means init": "kmeans_init",
        "no contrastive, no EMA": "ema",
        "no contrastive, no dead-code reset": "reset_after",
        "residual k-means": "method",
    }
    assert {name: differs(name, ladder[-2]) for name in chosen if name not in ladder} == {
        name: {setting} for name, setting in alone.items()
    }
