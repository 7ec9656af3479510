"""Every model of RecBole is trained and scored, or refused at once with the reason."""

import ast
import contextlib
import importlib.util
import math
import pkgutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.models import PairScores, find_model
from recbole_gr2.bridge.support import PACKAGES, check_size, check_support
from recbole_gr2.bridge.training import load_model, train_model
from recbole_gr2.config import recbole_config
from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error, QualityCheckError

FEATURES = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "brand"]}}
# Models that lack something on a data set without item features and a knowledge graph -> what the error names.
REFUSED = {
    "FDSA": "item features",
    "GRU4RecF": "item features",
    "GRU4RecKG": "knowledge graph",
    "KSR": "knowledge graph",
    "S3Rec": "item features",
    "SASRecF": "item features",
}


def names_in(package: str) -> list[str]:
    """Names of the models in a package of RecBole."""
    import importlib

    module = importlib.import_module(f"recbole.model.{package}")
    files = {each.name for each in pkgutil.iter_modules(module.__path__)}
    return [name for name in dir(module) if name.lower() in files and isinstance(getattr(module, name), type)]


def candidates_of_base_models() -> list[str]:
    return names_in("general_recommender") + names_in("sequential_recommender")


def test_every_sequential_and_general_model_is_accepted_or_refused_with_the_reason(tiny_settings, tmp_path):
    names, refused = candidates_of_base_models(), {}
    assert len(names) == 64
    for name in names:
        try:
            check_support(name, tiny_settings(tmp_path, base_model=name), base=True)
        except GR2Error as error:
            refused[name] = error
            assert error.where and error.why and error.do
    if importlib.util.find_spec("faiss") is None:
        assert isinstance(refused.pop("NCL"), DependencyError)
    assert {name: what for name, what in REFUSED.items() if what in str(refused[name])} == REFUSED
    assert set(refused) == set(REFUSED)


@pytest.mark.parametrize("package", ["context_aware_recommender", "knowledge_aware_recommender"])
def test_models_of_other_kinds_are_refused_with_their_kind(tiny_settings, tmp_path, package):
    kind = package.split("_")[0]
    names = names_in(package)
    assert len(names) > 5
    for name in names:
        with pytest.raises(ConfigurationError, match=f"{name} is a {kind} model"):
            check_support(name, tiny_settings(tmp_path), base=False)


@pytest.mark.parametrize("name", ["sasrec", "Nobody", "xgboost", "lightgbm", ""])
def test_names_without_a_usable_model_are_configuration_errors(name):
    with pytest.raises(ConfigurationError, match=f"there is no model named '{name}'|{name} cannot be loaded") as caught:
        find_model(name)
    assert name != "sasrec" or "did you mean SASRec" in caught.value.do


def test_packages_that_models_import_late_are_in_the_table():
    late = {}
    for name in candidates_of_base_models():
        source = Path(importlib.util.find_spec(find_model(name).__module__).origin).read_text()
        with warnings.catch_warnings(action="ignore"):  # RecBole has invalid escape sequences
            tree = ast.parse(source)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        imports = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Import)]
        packages = {alias.name for node in imports for alias in node.names}
        late |= {name: packages} if packages else {}
    assert {name: {package} <= late.pop(name) for name, (package, _, _) in PACKAGES.items()} == {
        "NCL": True,
        "NNCF": True,
    }
    assert late == {}


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("NNCF", {"base_neigh_info_method": "louvain"}, "needs the package community"),
        ("NeuMF", {"base_use_pretrain": True, "base_mf_pretrain_path": "mf.pth"}, "mf_pretrain_path"),
        ("RaCT", {"base_train_stage": "finetune"}, "train_stage"),
        ("LDiffRec", {"base_n_cate": 2}, "n_cate"),
        ("S3Rec", {**FEATURES, "base_item_attribute": "colour"}, "does not load colour"),
        ("FDSA", {"base_selected_features": ["brand"]}, r"item: \[item_id, brand\]"),
        ("FDSA", {**FEATURES, "base_selected_features": []}, "does not load any"),
    ],
)
def test_options_that_a_model_cannot_use_are_refused(tiny_settings, tmp_path, name, options, text):
    with pytest.raises((ConfigurationError, DependencyError), match=text):
        check_support(name, tiny_settings(tmp_path, base_model=name, **options), base=True)


def test_models_with_loaded_features_are_accepted(tiny_settings, tmp_path):
    for name, option in (("FDSA", {"selected_features": ["brand"]}), ("S3Rec", {"item_attribute": "brand"})):
        base = {f"base_{key}": value for key, value in option.items()}
        check_support(name, tiny_settings(tmp_path, base_model=name, **FEATURES, **base), base=True)
        check_support(name, tiny_settings(tmp_path, models=[name], models_options=option, **FEATURES), base=False)
        with pytest.raises(ConfigurationError, match="models_options"):
            check_support(name, tiny_settings(tmp_path, models=[name], **FEATURES), base=False)


@pytest.mark.parametrize(
    ("name", "option", "right"),
    [
        ("SASRecCPR", "reranker_CAN_NUM", 60),
        ("RaCT", "metrics_k", 60),
        ("DGCF", "train_batch_size", 100),
        ("DGCF", "cor_weight", 0),
    ],
)
def test_a_data_set_that_is_too_small_for_a_model_is_refused_before_any_stage_runs(
    tiny_settings, tmp_path, name, option, right
):
    settings = tiny_settings(tmp_path, base_model=name)
    data = Data(settings)
    with pytest.raises(ConfigurationError, match=f"{name} ") as caught:
        pipeline.check_data(pipeline.plan(settings, data, stages=["candidates"]), settings, data)
    assert f"base_{option}" in caught.value.where + caught.value.do
    data.settings = tiny_settings(tmp_path, base_model=name, **{f"base_{option}": right})
    check_size(name, data, base=True)


def test_an_error_of_a_recbole_model_names_the_model_and_the_line(tiny_settings, tmp_path, monkeypatch):
    def fail(self, interaction):
        raise ZeroDivisionError("no items")

    monkeypatch.setattr(find_model("BPR"), "calculate_loss", fail)
    data = Data(tiny_settings(tmp_path, base_model="BPR"))
    with pytest.raises(GR2Error, match="BPR stops with ZeroDivisionError: no items") as caught:
        train_model(data, tmp_path / "base", epochs=1)
    assert Path(__file__).name in caught.value.where and isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("name", ["CausalSASRec", "BPR"])
def test_a_loss_that_is_no_number_is_one_error(tiny_settings, tmp_path, name):
    data = Data(tiny_settings(tmp_path, base_model=name, base_learning_rate=1e30))
    with pytest.raises(QualityCheckError, match=f"the training loss of {name} is not a number") as caught:
        train_model(data, tmp_path / "base", epochs=3)
    assert "base_learning_rate" in caught.value.do


def test_pair_scores_are_those_of_predict_and_of_recboles_own_evaluation(tiny_settings, tmp_path):
    """NeuMF has no full_sort_predict. RecBole evaluates it in Trainer._full_sort_batch_eval."""
    from recbole.data.utils import get_dataloader
    from recbole.trainer import Trainer

    data = Data(tiny_settings(tmp_path, base_model="NeuMF", eval_batch_size=100))
    train_model(data, tmp_path / "base")
    model = load_model(data, tmp_path / "base", exclude_seen=False)
    rows, users = data.rows("valid")
    scores = torch.cat([scores for _, scores in model.scores("valid")])
    items = torch.arange(1, data.item_count + 1)
    for row in (0, 7, len(users) - 1):
        pairs = type(rows)({data.uid: torch.full_like(items, int(users[row])), data.iid: items})
        with torch.no_grad():
            assert torch.allclose(scores[row, 1:], model.model.predict(pairs), atol=1e-6)
    targets = scores.gather(1, rows[data.iid].unsqueeze(1))
    ranks = ((scores > targets).sum(1) + 1).tolist()
    ndcg = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / len(ranks)

    config = recbole_config(
        data.settings,
        find_model("NeuMF"),
        metrics=["NDCG"],
        topk=[10],
        valid_metric="NDCG@10",
        metric_decimal_place=12,
        show_progress=False,
        checkpoint_dir=str(tmp_path),
    )
    del model.model.full_sort_predict
    loader = get_dataloader(data.config, "valid")(data.config, data.built[1], None, shuffle=False)
    with contextlib.chdir(tmp_path):  # RecBole writes logs to the current folder
        trainer = Trainer(config, model.model)
    result = trainer.evaluate(loader, load_best_model=False)
    assert result["ndcg@10"] == pytest.approx(ndcg, abs=1e-9) and ndcg > 0.05


def test_only_models_without_full_sort_predict_are_scored_pair_by_pair():
    assert {name for name in candidates_of_base_models() if PairScores.needed(find_model(name))} == {
        "ConvNCF",
        "DIEN",
        "DIN",
        "NNCF",
        "NeuMF",
    }


@pytest.mark.parametrize("name", ["Random", "ADMMSLIM"])
def test_scores_with_random_numbers_repeat_and_leave_the_random_state(tiny_settings, tmp_path, name):
    data = Data(tiny_settings(tmp_path, base_model=name))
    train_model(data, tmp_path / "base", epochs=1)
    model = load_model(data, tmp_path / "base")
    state = torch.random.get_rng_state()
    first, again = (torch.cat([scores for _, scores in model.scores("test")]) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    assert first[0].unique().numel() > 10


SHORT = {"MAX_ITEM_LIST_LENGTH": 5, "base_epochs": 1}
SPECIAL = {  # models that need more than RecBole's usual data set, trainer or checkpoint
    "DIN": {"base_mlp_hidden_size": [16]},
    "DIEN": {"base_mlp_hidden_size": [16]},
    "FEARec": {},
    "ConvNCF": {"base_embedding_size": 16, "base_cnn_channels": [1, 8, 8, 8, 8], "base_cnn_kernels": [2, 2, 2, 2]}
    | {"base_cnn_strides": [2, 2, 2, 2]},
    "NNCF": {},
    "RaCT": {"base_metrics_k": 20, "base_pretrain_epochs": 2},
    "S3Rec": {**FEATURES, "base_item_attribute": "brand", "base_pretrain_epochs": 1},
    "FDSA": {**FEATURES, "base_selected_features": ["brand"]},
    "SASRecF": {**FEATURES, "base_selected_features": ["brand"]},
    "GRU4RecF": {**FEATURES, "base_selected_features": ["brand"]},
    "SASRecCPR": {"base_reranker_CAN_NUM": 20},
    "GRU4RecCPR": {"base_reranker_CAN_NUM": 20},
    "DGCF": {"base_train_batch_size": 100},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
def test_special_models_are_trained_stored_and_loaded(tiny_settings, tmp_path, monkeypatch, name):
    from recbole_gr2.bridge import training

    networks, real = [], training._make_trainer
    monkeypatch.setattr(training, "_make_trainer", lambda *args: networks.append(args[2]) or real(*args))
    data = Data(tiny_settings(tmp_path, base_model=name, **SHORT, **SPECIAL[name]))
    check_size(name, data, base=True)
    metadata = train_model(data, tmp_path / "base")
    assert metadata["epochs"] == 1 and metadata["best_valid"]["NDCG@10"] > 0
    trained = networks[-1]
    train_model(data, tmp_path / "hold_out", hold_out=True, epochs=1)
    model = load_model(data, tmp_path / "base")
    loaded = torch.cat([scores for _, scores in model.scores("test")])
    assert loaded.shape == (150, 61) and not loaded.isnan().any()
    same = torch.cat([scores for _, scores in replace(model, model=trained.eval()).scores("test")])
    assert torch.allclose(loaded, same, atol=1e-5)
    assert {file.suffix for file in (tmp_path / "base").iterdir()} <= {".json", ".safetensors", ".npz"}


@pytest.mark.slow
def test_ract_is_trained_in_its_three_stages(tiny_settings, tmp_path):
    """The critic is trained in the second stage only, the actor in the other two."""
    from recbole_gr2.bridge import training

    lines, states, real = [], [], training._make_trainer

    def spy(trainer_class, config, network, *rest):
        states.append((config["train_stage"], {k: v.clone() for k, v in network.state_dict().items()}))
        return real(trainer_class, config, network, *rest)

    data = Data(tiny_settings(tmp_path, base_model="RaCT", **SHORT, **SPECIAL["RaCT"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_make_trainer", spy)
        train_model(data, tmp_path / "base", say=lines.append)
    assert [stage for stage, _ in states] == ["actor_pretrain", "critic_pretrain", "finetune"]
    _, first = states[0]
    _, second = states[1]
    _, third = states[2]
    critic, actor = "critic_net.1.weight", "encoder.0.weight"
    assert torch.equal(first[critic], second[critic]) and not torch.equal(second[critic], third[critic])
    assert not torch.equal(first[actor], second[actor]) and torch.equal(second[actor], third[actor])
    assert len(lines) == 3
