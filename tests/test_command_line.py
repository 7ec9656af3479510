"""The command line and config files: what is read, and that every mistake is one error of this package."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_gr2 import pipeline, preflight
from recbole_gr2.config import declarations, load_settings, read_value
from recbole_gr2.config.declaration import recbole_declarations
from recbole_gr2.config.values import check_intervals
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.quick_start import main, parse

SMOKE = {"preset": "smoke"}
ROOT = Path(__file__).resolve().parent.parent


def read(*argv: str):
    options, command_line = parse(argv)
    return load_settings(command_line={**SMOKE, **command_line}, config_files=options.config_files)


def refused(*argv: str) -> str:
    with pytest.raises(GR2Error) as error:
        read(*argv)
    return str(error.value)


# --- intervals and separators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("[7,inf)", "[7,inf)"),
        ("[5,10]", "[5,10]"),
        ("(0,1];[3,4)", "(0,1];[3,4)"),
        ("[0, 2) ; (4,inf)", "[0, 2) ; (4,inf)"),
        ("'[7,inf)'", "[7,inf)"),
        ("(-inf,1e3]", "(-inf,1e3]"),
    ],
)
def test_intervals_have_the_form_of_recbole(word, value, tmp_path):
    for form in ([f"--user_inter_num_interval={word}"], ["--user_inter_num_interval", word]):
        assert read(*form).recbole["user_inter_num_interval"] == value
    file = tmp_path / "mine.yaml"
    file.write_text(f"user_inter_num_interval: {word}  # a comment\nval_interval: {{rating: {word}}}\n")
    recbole = read("--config_files", str(file)).recbole
    assert recbole["user_inter_num_interval"] == value
    assert check_intervals(recbole["val_interval"]["rating"]) == value
    assert read(f"--val_interval={{rating: {word}}}").recbole["val_interval"] == recbole["val_interval"]


@pytest.mark.parametrize("word", ["7", "[7,inf", "[7]", "[a,b]", "[3,1]", "[1,2,3]", "{}", "[nan,1]", "[0,1];", "(,)"])
def test_what_is_no_interval_is_reported_with_its_key(word):
    assert "user_inter_num_interval is " in refused(f"--user_inter_num_interval={word}")
    assert "val_interval " in refused(f"--val_interval={{rating: {word!r}}}")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (",", ","),
        ("\t", "\t"),
        ("\\t", "\t"),
        ("'\\t'", "\t"),
        ('"\\t"', "\t"),
        (";", ";"),
        ("|", "|"),
        ("::", "::"),
        (" ", " "),
    ],
)
def test_separators(word, value):
    assert read(f"--field_separator={word}").recbole["field_separator"] == value
    assert read(f"--seq_separator={word}").recbole["seq_separator"] == value


def test_values_that_are_no_yaml_are_texts():
    assert read_value("[1, 2") == "[1, 2" and read_value("@x") == "@x" and read_value("{a: 1, a: 2}") == "{a: 1, a: 2}"
    assert "topk is '[1, 2', expected list of int >= 1" in refused("--topk=[1, 2")
    assert "mid_mix is '{sequential: 1, sequential: 2}', expected dict" in refused(
        "--mid_mix={sequential: 1, sequential: 2}"
    )
    assert read("--trace_file=2020-01-01")["trace_file"] == "2020-01-01"


# --- config files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ("topk: [1, 2\nseed: 3\n", "", "line 2, column 5"),
        ("rl_steps: 3\n\tseed: 1\n", "", "line 2, column 1"),
        ("seed: 1\nseed: 2\n", "", "line 2, column 1: the key 'seed' occurs twice"),
        ("mid_mix: {caption: 1, caption: 2}\n", "", "the key 'caption' occurs twice"),
        ("- seed\n- 1\n", "", "must contain a mapping"),
        ("seed\n", "", "must contain a mapping"),
        ("seed: !!int one\n", "", "not valid YAML"),
        ("seed: !!python/object:os.system 1\n", "", "line 1, column 7"),
        (b"seed: 1\nllm: \xff\xfe\n", ":2", "not encoded in UTF-8"),
        ("[" * 2000, "", "not valid YAML"),
        ("seed: \0\n", "", "not valid YAML"),
    ],
)
def test_config_files_that_cannot_be_read_are_named_with_the_line(content, where, what, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as error:
        load_settings(config_files=[file])
    assert what in error.value.what and error.value.where == f"{file}{where}"


def test_keys_that_are_no_texts_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("2: 2\n~: 3\nTrue: 4\nmid_mix: {1: 2}\n")
    text = refused("--config_files", str(file))
    for key in ("2", "None", "True"):
        assert f"{file}: the key {key} is no text" in text
    assert "mid_mix has the key 1, expected text" in text


def test_an_empty_config_file_changes_nothing(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing\n")
    assert dict(read("--config_files", str(file))) == dict(read())


def test_a_folder_is_no_config_file(tmp_path):
    assert "cannot be read: Is a directory" in refused("--config_files", str(tmp_path))
    for name in ("x" * 5000, "a\0b"):
        assert "cannot be read" in refused("--config_files", name)
    with pytest.raises(MissingFileError):
        read("--config_files", str(tmp_path / "none" / "mine.yaml"))


def test_all_config_files_of_a_command_are_read(tmp_path):
    for name, text in (("a.yaml", "seed: 1\nrl_steps: 2\n"), ("b.yaml", "seed: 3\n")):
        (tmp_path / name).write_text(text)
    chosen = read("--config_files", str(tmp_path / "a.yaml"), "--config_files", str(tmp_path / "b.yaml"))
    assert (chosen["seed"], chosen["rl_steps"]) == (3, 2)


def test_arguments_of_the_wrong_type_in_python():
    for given_ in ({"config_files": "mine.yaml"}, {"config_dict": ["seed"]}, {"command_line": "seed"}):
        with pytest.raises(ConfigurationError):
            load_settings(**given_)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--seeds=1,x"], "--seeds: '1,x' is no list of integers"),
        (["--seeds=-1,2"], "no list of integers"),
        (["--seeds="], "no list of integers"),
        (["--seeds=3,3"], "two or more different seeds"),
        (["--seeds=3"], "two or more different seeds"),
        (["--stages="], "--stages: '' names nothing"),
        (["--stages=sft,,rl"], "--stages: '' names nothing"),
        (["--from_stage="], "--from_stage: '' names nothing"),
        (["--ablation="], "--ablation: '' names nothing"),
        (["--ablation=rewards"], "did you mean reward"),
        (["--force=yes"], "ignored explicit argument 'yes'"),
        (["--dataset"], "expected one argument"),
        (["--preset="], "no preset named ''"),
        (["--dataset="], "dataset is ''"),
        (["--seed=1", "--seed=2"], "seed has two values, 1 and 2"),
        (["--data_path=~/data"], "data_path is '~/data', in which ~ would be the name of a folder"),
        (["--models=SASRec,,Pop"], "expected no empty text"),
        (["--models=SASRec,SASRec"], "models has 'SASRec' twice"),
        (["--models=sasrec"], "there is no model named 'sasrec'; nearest: SASRec"),
        (["--stages=candidats"], "did you mean candidates"),
        (["--stages=rerank_stf"], "did you mean rerank_sft"),
        (["--dataset=ml-100"], "did you mean ml-100k"),
    ],
)
def test_mistakes_in_a_command_are_one_error(argv, text, tmp_path, capsys):
    assert main(["--preset=smoke", f"--checkpoint_dir={tmp_path}", *argv]) in (2, 4)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and text in captured.err and captured.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_names_are_checked_before_torch_is_imported(tmp_path):
    wrong = ["--base_model=sasrec", "--eval_rows=[stf]", "--trace_teacher=rule", "--prior_features=[bas]", "--stages=x"]
    wrong += ["--rl_rewards={rank_gian: 1}", "--prompt_template=x", "--metrics=[NDGC]", "--dataset=nowhere", "--seed=x"]
    wrong += ["--ablation=x", "--config_files=x.yaml", "--models=FM", "--checkpoint_dir=/dev/null/x", "--preset=smok"]
    code = f"""
import sys
from recbole_gr2.quick_start import main
for argument in {wrong!r}:
    code = main([argument])
    if code not in (2, 4) or "torch" in sys.modules:
        sys.exit(f"{{argument}}: exit code {{code}}, torch imported: {{'torch' in sys.modules}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(wrong)


# --- any value at all ------------------------------------------------------------------------------------------------

KEYS = [
    *declarations(),
    *recbole_declarations(),
    *(f"base_{key}" for key in recbole_declarations()),
    *(
        "base_hidden_size",
        "base_n_heads",
        "base_loss_type",
        "base_hidden_act",
        "base_attn_dropout_prob",
        "learning_rate",
    ),
]
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 10**30, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(alphabet=string.punctuation + " \t", max_size=6),
    st.sampled_from(["", " ", "~", "a:b", ":", "SASRec", "random", "x" * 5000, "a\0b", "../..", "http://", "[5,inf)"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(SCALARS, inner, max_size=3)),
    max_leaves=6,
)
# `pytest tests/test_command_line.py -k test_any --hypothesis-profile=long` tries many more examples.
ANY = settings(
    derandomize=settings().max_examples == 25,  # By default the examples are always the same.
    suppress_health_check=list(HealthCheck),
)


def accepted_or_refused(*, stages: bool = False, **sources) -> None:
    """Settings are accepted, or refused by an error of this package. Accepted ones can be written and read again."""
    try:
        accepted = load_settings(**sources)
        preflight.check(accepted)
        if stages:
            pipeline.check(accepted)
    except GR2Error:
        return
    again = load_settings(config_dict=yaml.safe_load(accepted.as_yaml()))
    assert dict(again) == dict(accepted)


@ANY
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_is_accepted_or_refused(values):
    accepted_or_refused(config_dict={**SMOKE, **values}, stages=True)


@ANY
@given(
    st.sampled_from(KEYS), st.one_of(TEXTS, VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True)))
)
def test_any_word_of_a_command_is_read_or_refused(key, word):
    try:
        options, command_line = parse([f"--{key}={word}"])
        accepted_or_refused(command_line={**SMOKE, **command_line}, config_files=options.config_files)
    except GR2Error:
        pass


@ANY
@given(st.lists(st.one_of(TEXTS, TEXTS.map("--{}".format), st.sampled_from([f"--{key}" for key in KEYS])), max_size=4))
def test_any_command_is_read_or_refused(argv):
    argv = [word for word in argv if not word.startswith(("-h", "--h"))]
    try:
        options, command_line = parse(argv)
        accepted_or_refused(command_line={**SMOKE, **command_line}, config_files=options.config_files)
    except GR2Error:
        pass


@ANY
@given(
    st.one_of(st.text(alphabet="ab:-{}[],#&*!|>'\"%@`~? \n\t1.", max_size=40).map(str.encode), st.binary(max_size=20))
)
def test_any_config_file_is_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    accepted_or_refused(config_dict=SMOKE, config_files=[file])
