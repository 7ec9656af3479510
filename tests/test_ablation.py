"""Ablations: what is refused before anything runs, what is cached, and what the table contains."""

import copy
import itertools
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import MOVIES
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2 import ablation, pipeline
from recbole_gr2.ablation import data_for, figure, load_variant, read_ablation, render_ablation
from recbole_gr2.config import load_settings, properties_folder
from recbole_gr2.console import pipe_table
from recbole_gr2.errors import ConfigurationError, MissingFileError, QualityCheckError
from recbole_gr2.quick_start import main
from recbole_gr2.report.tables import figures_table
from recbole_gr2.report.verdict import BANNER
from recbole_gr2.store import read_manifest, write_manifest
from recbole_gr2.types import StageRecord

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "result.schema.json").read_text())
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
        {"name": "random", "published": {"unique": 0.83}},
    ],
    "note": "What a reader has to know.",
}


@pytest.fixture(scope="module")
def loaded():
    """Data sets that are loaded, by the settings that they depend on."""
    return {}


@pytest.fixture(autouse=True)
def _load_once(loaded, monkeypatch):
    """Load a data set once for all tests. Its settings are those of each test."""

    def load(settings, load=ablation.Data):
        recbole = {key: value for key, value in settings.recbole.items() if key != "checkpoint_dir"}
        key = repr((settings["dataset"], recbole, settings.results(["text_"])))
        if key not in loaded:
            loaded[key] = load(settings)
        data = copy.copy(loaded[key])
        data.settings = settings
        return data

    monkeypatch.setattr(ablation, "Data", load)


@pytest.fixture
def smoke(tmp_path, movies_folder):
    """Arguments for a short run on the data set `movies` with its results in an empty folder."""
    options = {**MOVIES, "preset": "smoke", "data_path": movies_folder, "checkpoint_dir": tmp_path / "saved"}
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture
def command(tmp_path, smoke):
    """command(values of the file, further arguments): the argv of an ablation in an empty folder."""

    def build(values=TWO, *arguments):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["--ablation", str(file), *smoke, *arguments]

    return build


@pytest.fixture
def executed(monkeypatch):
    """Names of the executed stages. Stages are finished at once, with summaries that are made by hand."""
    names = []

    def summary(stage, settings):
        if stage != "tokenizer":
            return {"items": 1682}
        nearest = not settings["sid_random_last"]
        if nearest and settings["sid_min_unique"] > 0.9:
            raise QualityCheckError("uniqueness 90.00% is below 99.00%", where="tokenizer", why="x", do="y")
        return {
            "uniqueness": 0.9 if nearest else 1.0,
            "used_codes": [8, 8],
            "entropy": [3.0, 3.0, 2.5, 1.5],
            "neighbourhood": {"same_path": [0.5, 0.5, 0.5, 0.25]} if nearest else None,
        }

    def execute(planned, settings, data, console):
        for entry in planned:
            if read_manifest(entry.folder) is None:
                names.append(entry.stage.name)
                entry.folder.mkdir(parents=True, exist_ok=True)
                record = StageRecord(
                    stage=entry.stage.name,
                    key=entry.key,
                    version=entry.stage.version,
                    needs=entry.needs,
                    settings=entry.settings,
                    seconds=5.0,
                    peak_memory_mb=100,
                    summary=summary(entry.stage.name, settings),
                    code="1.0",
                    sources=entry.sources,
                )
                write_manifest(entry.folder, record)

    monkeypatch.setattr(pipeline, "execute", execute)
    return names


def changed(**fields):
    return {**TWO, **fields}


def manifests(tmp_path) -> dict[Path, int]:
    """Every finished tokenizer stage, and when it was finished."""
    stage = tmp_path / "saved" / "gr2" / "movies" / "stages" / "tokenizer"
    return {file: file.stat().st_mtime_ns for file in stage.glob("*/manifest.json")}


def result_of(argv, capsys) -> tuple[Path, dict, str]:
    """Run a command: the path of its result.json, the result and what it printed on stderr."""
    assert main(argv) == 0
    captured = capsys.readouterr()
    path = Path(captured.out.splitlines()[-1])
    return path, json.loads(path.read_text()), captured.err


def keys_of(variant) -> dict[str, str]:
    return {stage["stage"]: stage["key"][0] for stage in variant["stages"]}


def check_two_variants(path: Path, result: dict, tmp_path: Path) -> None:
    """Check what an ablation of the two variants of TWO wrote."""
    assert path.name == "result.json" and path.parent.parent == tmp_path / "saved" / "gr2" / "movies" / "ablations"
    jsonschema.validate(result, SCHEMA, cls=jsonschema.Draft202012Validator)
    records = {file.parent.name: read_manifest(file.parent) for file in manifests(tmp_path)}
    assert len(records) == 2 and (result["schema"], result["seeds"]) == (2, [2020])
    nearest, random = result["variants"]
    for variant, random_last in ((nearest, 0), (random, 1)):
        record = records[keys_of(variant)["tokenizer"]]
        summary = record.summary
        assert record.settings["sid_random_last"] == random_last and record.settings["sid_epochs"] == 1
        assert variant["figures"] == {
            "unique": summary["uniqueness"],
            "codes": summary["used_codes"],
            "last": summary["entropy"][3],
            "none": None if random_last else summary["neighbourhood"]["same_path"][3],
        }
        assert list(keys_of(variant)) == ["embeddings", "tokenizer"] and variant["failed"] == ""
        assert variant["stages"][1]["seconds"] == [record.seconds]
    assert [stage["cached"] for stage in (*nearest["stages"], *random["stages"])] == [[False], [False], [True], [False]]
    assert keys_of(nearest)["embeddings"] == keys_of(random)["embeddings"]
    assert nearest["figures"]["unique"] < random["figures"]["unique"] == 1.0

    header, _rule, *lines = figures_table(result).splitlines()
    assert header.split() == ["variant", "unique", "codes", "last", "none", "published:", "unique"]
    assert [line.split()[0] for line in lines] == ["nearest", "random"]
    assert lines[0].split()[1] == f"{nearest['figures']['unique']:.4f}" and lines[0].split()[-1] != "0.8300"
    assert lines[1].split()[1] == "1.0000" and lines[1].split()[-1] == "0.8300"
    report = (path.parent / "report.md").read_text()
    assert report == render_ablation(result)  # a function of result.json
    for text in (
        figures_table(result, pipe_table),
        BANNER,
        result["command"],
        TWO["note"],
        "Preset smoke, seed 2020",
        "random_last: 0",
    ):
        assert text in report
    assert "Failed" not in report and f"{nearest['stages'][1]['seconds'][0]:.0f} s" in report


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_variants_in_one_table_and_the_second_run_is_all_cached(command, tmp_path, capsys, executed):
    path, result, _ = result_of(command(), capsys)
    check_two_variants(path, result, tmp_path)
    before = manifests(tmp_path)
    assert executed == ["embeddings", "tokenizer", "tokenizer"]
    again, repeated, _ = result_of(command(), capsys)
    assert again != path and manifests(tmp_path) == before and len(executed) == 3
    for variant in (*result["variants"], *repeated["variants"]):
        for stage in variant["stages"]:
            stage["cached"] = None
    assert repeated == result


@pytest.mark.slow
def test_two_variants_of_a_real_tokenizer(command, tmp_path, capsys):
    path, result, _ = result_of(command(), capsys)
    check_two_variants(path, result, tmp_path)
    before = manifests(tmp_path)
    _, _, printed = result_of(command(), capsys)
    assert manifests(tmp_path) == before and printed.count("tokenizer cached") == 2


def test_a_stopped_ablation_continues(command, tmp_path, capsys, monkeypatch, executed):
    execute, calls = pipeline.execute, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(*arguments)

    monkeypatch.setattr(pipeline, "execute", stop_at_the_second)
    assert main(command()) == 130
    stopped = capsys.readouterr()
    assert stopped.out == "" and "the same command continues" in stopped.err and len(manifests(tmp_path)) == 1
    _, result, printed = result_of(command(), capsys)
    assert executed == ["embeddings", "tokenizer", "tokenizer"]  # finished stages did not run again
    assert [variant["figures"]["unique"] is None for variant in result["variants"]] == [False, False]
    plan = [line.split() for line in printed.splitlines() if line.startswith(("nearest", "random"))][:4]
    assert [line[3] for line in plan] == ["cached", "cached", "cached", "run"]


def test_what_two_variants_share_runs_once(command, tmp_path, capsys, executed):
    values = changed(variants=[{"name": "one"}, {"name": "two"}])
    assert main(command(values, "--dry_run")) == 0
    captured = capsys.readouterr()
    plan = [line.split() for line in captured.err.splitlines() if line.startswith(("one", "two"))]
    assert [[*line[:2], *line[3:]] for line in plan] == [
        ["one", "embeddings", "run", "first", "time"],
        ["one", "tokenizer", "run", "first", "time"],
        ["two", "embeddings", "shared", "one"],
        ["two", "tokenizer", "shared", "one"],
    ]
    assert [line[2] for line in plan[:2]] == [line[2] for line in plan[2:]]
    assert captured.out == "" and not (tmp_path / "saved").exists()
    assert main(command(values)) == 0
    assert executed == ["embeddings", "tokenizer"] and len(manifests(tmp_path)) == 1


def test_a_variant_whose_quality_check_fails_keeps_its_line(command, tmp_path, capsys, executed):
    path, result, printed = result_of(command(changed(settings={"sid_epochs": 1, "sid_min_unique": 0.99})), capsys)
    jsonschema.validate(result, SCHEMA, cls=jsonschema.Draft202012Validator)
    report = (path.parent / "report.md").read_text()
    nearest, random = result["variants"]
    assert "below 99.00%" in nearest["failed"] and random["failed"] == ""
    assert set(nearest["figures"].values()) == {None} and list(keys_of(nearest)) == ["embeddings"]
    assert random["figures"]["unique"] == 1.0
    assert "nearest (failed)" in figures_table(result) and "random (failed)" not in figures_table(result)
    assert "`nearest` failed" in report and "below 99.00%" in report and "variant 'nearest' failed" in printed


def test_an_empty_column_is_named(command, capsys, executed):
    columns = {"x": "tokenizer.entropy.9", "unique": "tokenizer.uniqueness"}
    _, _, printed = result_of(command(changed(columns=columns)), capsys)
    assert "column 'x' is empty: no variant has tokenizer.entropy.9" in printed and "column 'unique'" not in printed


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(argv, tmp_path, capsys) -> str:
    """Return the error message of a command that runs nothing."""
    assert main(argv) == 2
    assert not (tmp_path / "saved").exists()
    return capsys.readouterr().err


def test_all_variants_are_checked_before_any_runs(command, tmp_path, capsys):
    text = refused(
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
    for part in (
        "'misspelt'",
        "unknown key 'sid_epoch'; nearest: sid_epochs",
        "'out of range'",
        "sid_random_last is 9",
        "'no loss'",
        "rqkmeans is not trained by a loss",
        "'no model'",
        "Nonsense",
    ):
        assert part in text
    assert "'fine'" not in text


def test_a_common_setting_that_is_wrong_is_told_once(command, tmp_path, capsys):
    text = refused(command(changed(settings={"sid_epoch": 2})), tmp_path, capsys)
    assert text.count("unknown key 'sid_epoch'") == 1 and "ablation mine: unknown key" in text
    text = refused(command(changed(stages=["tokeniser"])), tmp_path, capsys)
    assert text.count("there is no stage 'tokeniser'") == 1 and "'nearest', 'random'" in text


def test_the_user_cannot_give_what_a_variant_varies(command, tmp_path, capsys):
    text = refused(command(TWO, "--sid_random_last=2"), tmp_path, capsys)
    assert "'nearest': the variant sets sid_random_last to 0, the command line to 2" in text and "'random'" not in text
    file = tmp_path / "user.yaml"
    file.write_text("sid_random_last: 2")
    text = refused(command(TWO, f"--config_files={file}"), tmp_path, capsys)
    assert f"the variant sets sid_random_last to 0, the {file} to 2" in text
    assert main(command(TWO, "--sid_random_last=0", "--dry_run")) == 0


def test_an_ablation_chooses_its_stages(command, tmp_path, capsys):
    for word in ("--stages=tokenizer", "--from_stage=tokenizer", "--force"):
        assert "an ablation chooses its own stages" in refused(command(TWO, word), tmp_path, capsys)


def test_columns_are_of_stages_that_run_and_of_fields_of_their_summaries(command, tmp_path, capsys, executed):
    one = [{"name": "only"}]
    for field, metric, near in (("metrics", "ndgc@5", "ndcg@5"), ("vs_base", "recall@10.low", "recall@1")):
        path = f"evaluate.methods.method=base&scope=hit_users.{field}.{metric}"
        text = refused(command(changed(variants=one, stages=["evaluate"], columns={"x": path})), tmp_path, capsys)
        assert f"the metric '{metric.removesuffix('.low')}', which {field} does not contain" in text and near in text
    text = refused(command(changed(variants=one, columns={"x": "sft.loss"})), tmp_path, capsys)
    assert "no variant runs: {'x': 'sft.loss'}" in text
    assert main(command(changed(variants=one, columns={"x": "tokenizer.unique"}))) == 2
    text = capsys.readouterr().err
    assert "the summary of the tokenizer stage has no 'unique'" in text and "'uniqueness'" in text
    assert executed == ["embeddings", "tokenizer"]
    more = [*one, {"name": "other", "settings": {"sid_random_last": 0}}]
    assert main(command(changed(variants=more, columns={"x": "tokenizer.unique"}))) == 2
    assert executed == ["embeddings", "tokenizer"]  # cached stages show that the field is missing before others run


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"stage": []}, r"the file has the unknown keys \['stage'\]; known keys: stages, columns"),
        ({"stages": "tokenizer"}, "stages must be a list"),
        ({"settings": ["sid_epochs"]}, "must be maps"),
        ({"variants": []}, "variants with different names"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "variants with different names"),
        ({"variants": [{"name": "a"}, {"settings": {}}]}, "variant 2 has no name"),
        ({"variants": {"a": {"settings": {}}}}, "variants must be a list"),
        ({"variants": ["a"]}, "variant 1 is 'a', expected keys with values"),
        ({"variants": [{"name": "a", "settings": None}]}, "must be maps"),
        ({"variants": [{"name": "a", "published": {"b": 1}}]}, "published figure must have the heading"),
        ({"variants": None}, "variants must be a list"),
    ],
)
def test_a_file_that_is_not_an_ablation(tmp_path, broken, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**changed(variants=[{"name": "a"}]), **broken}))
    with pytest.raises(ConfigurationError, match=message):
        read_ablation(str(file))


def test_an_ablation_that_does_not_exist():
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
    nearest, random = mine.variants

    def epochs(variant=random, text="", **given):
        user.write_text(text)
        given["config_dict"] = {"preset": "smoke", **given.get("config_dict", {})}
        return load_variant(mine, variant, {**given, "config_files": [user]})["sid_epochs"]

    assert load_settings(config_dict={"preset": "smoke"})["sid_epochs"] == 20
    assert epochs() == 1
    nearest.settings["sid_epochs"] = 2
    assert epochs(nearest) == 2
    assert epochs(text="sid_epochs: 3") == 3
    assert epochs(text="sid_epochs: 3", config_dict={"sid_epochs": 4}) == 4
    assert epochs(config_dict={"sid_epochs": 4}, command_line={"sid_epochs": 5}) == 5


@pytest.mark.slow
def test_data_is_loaded_again_only_if_it_differs():
    def chosen(**changes):
        return load_settings(config_dict={"preset": "smoke", **changes})

    data = data_for(chosen())
    same = data_for(chosen(sid_epochs=1, cand_num=5), data)
    assert same.dataset is data.dataset and same.settings["cand_num"] == 5 and data.settings["cand_num"] == 10
    assert same.fingerprint == data.fingerprint
    assert data_for(chosen(topk=[2], valid_metric="NDCG@2"), data).config["topk"] == [2]
    assert data_for(chosen(text_categories=None), data).fingerprint != data.fingerprint


NAMES = st.text("abc@1", min_size=1, max_size=3)
SUMMARIES = st.recursive(
    st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def paths(value, before):
    yield before, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, f"{before}.{key}")


@given(SUMMARIES)
def test_every_path_leads_to_its_value(summary):
    for path, value in paths(summary, "stage"):
        assert figure({"stage": summary, "other": {}}, path) == value


def test_where_nothing_was_measured():
    table = [{"method": "a"}]
    summaries = {"TIGER": {"metrics": {"recall@10": 0.06}, "valid": None, "list": [1], "table": table}}
    assert figure(summaries, "TIGER.metrics.recall@10") == 0.06
    for path in (
        "sft.loss",
        "TIGER.valid",
        "TIGER.valid.loss",
        "TIGER.list.1",
        "TIGER.table.method=b.n",
        "TIGER.table.method=a&scope=all_users",
    ):
        assert figure(summaries, path) is None
    for path in ("TIGER.loss", "TIGER.metrics.recall@5", "TIGER.list.first", "TIGER.metrics.recall@10.x"):
        with pytest.raises(ConfigurationError, match="there is no figure"):
            figure(summaries, path)


# --- packaged ablations ----------------------------------------------------------------------------------------------

PACKAGED = sorted(file.stem for file in (properties_folder() / "ablation").glob("*.yaml"))


def test_there_are_packaged_ablations():
    assert "tokenizer" in PACKAGED


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_ablations_can_be_planned(name, smoke, capsys):
    """Settings, stages and the stages of columns are checked by the plan; no two variants are the same run."""
    assert main(["--ablation", name, *smoke, "--dry_run"]) == 0
    text = capsys.readouterr().err
    shared = [line for line in text.splitlines() if " shared " in line]
    mine = read_ablation(name)
    assert " run " in text and mine.note and not any(f" {mine.stages[-1]} " in line for line in shared)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rerank", "reward"])
def test_the_columns_of_packaged_ablations_are_figures_of_a_run(finished, name):
    summaries, rounds = {stage: record.summary for stage, record in finished.records.items()}, 2
    assert finished.settings["rl_steps"] == rounds
    figures = {heading: figure(summaries, path) for heading, path in read_ablation(name).columns.items()}
    assert len(figures) > 10 and None not in figures.values()
    curves = [value for value in figures.values() if isinstance(value, list)]
    assert len(curves) == (4 if name == "reward" else 0) and all(len(curve) == rounds for curve in curves)


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
