"""Rules of settings that a declaration cannot express: of one setting, and of several."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recbole_gr2.config.declaration import LARGEST, Declaration, check_option, properties_folder, recbole_declarations
from recbole_gr2.config.recbole_options import (
    GENERATOR,
    ONEREC_THINK,
    RECBOLE_FIXED,
    RECBOLE_TRAINING,
    SEQUENTIAL,
    base_model_properties,
    candidate_models,
    model_declarations,
    model_file,
    recbole_metrics,
    recbole_models,
    recbole_options,
)
from recbole_gr2.config.values import check_intervals, is_file
from recbole_gr2.errors import nearest

GENERATING = ("sft", "rl", "shuffled", "distilled", "internalised")  # methods whose language model writes an answer
LEAST_TEMPERATURE = 0.01  # of sampling, besides 0 for the most likely token
PATHS = ("data_path", "checkpoint_dir", "prompt_template", "cand_file", "mid_general", "trace_file")


def _check_texts(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key, value in values.items():
        if isinstance(value, str) and not value and key != "gpu_id":
            raise ValueError(f"{key} is empty")
        if key in PATHS and isinstance(value, str) and value.startswith("~"):
            raise ValueError(f"{key} is {value!r:.200}, in which ~ would be the name of a folder; write the whole path")
        if isinstance(value, list) and any(isinstance(item, str) and not item.strip() for item in value):
            raise ValueError(f"{key} is {value!r:.200}, expected no empty text")


def _check_repeats(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key, value in values.items():
        if isinstance(value, list) and key in declared and key != "sid_hidden":
            repeated = [item for position, item in enumerate(value) if item in value[:position]]
            if repeated:
                raise ValueError(f"{key} has {repeated[0]!r:.200} twice")


def _check_dataset(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["dataset"]
    if not re.fullmatch(r"[^/\\]{1,200}", name) or name in (".", ".."):
        raise ValueError(f"dataset is {name!r:.200}, expected the name of a folder in data_path")


def _check_reranker(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["model"] != "GR2":
        raise ValueError(
            f"model is {values['model']!r:.200}, expected GR2, the only re-ranker; a model that proposes candidates is "
            f"--base_model {values['model']:.200}"
        )


def _check_base_model(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if not values["base_model"]:
        raise ValueError("base_model is [], expected at least one model")
    for name in values["base_model"]:
        if name in ONEREC_THINK:
            raise ValueError(
                f"{name} cannot be the base_model: it proposes no candidates of train requests; name it in models"
            )
        _check_model(name, [*candidate_models(), GENERATOR])


def _check_base_options(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name, options in values["base_options"].items():
        if name not in values["base_model"]:
            raise ValueError(
                f"base_options has {name!r:.200}, expected a name in base_model ({', '.join(values['base_model'])})"
            )
        _check_options(options, RECBOLE_TRAINING, [name], f"base_options.{name}", declared)


def _check_weights(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    weights = values["cand_weights"]
    if weights is None:
        return
    if unknown := [name for name in weights if name not in values["base_model"]]:
        raise ValueError(
            f"cand_weights has {unknown[0]!r:.200}, expected names in base_model ({', '.join(values['base_model'])})"
        )
    if not any(weights.values()):
        raise ValueError(f"cand_weights is {weights!r:.200}, expected at least one weight > 0")


def _check_models(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name in values["models"]:
        _check_model(name, [*candidate_models(), GENERATOR, *ONEREC_THINK])
    shared = recbole_options() | RECBOLE_TRAINING
    _check_options(values["models_options"], shared, values["models"], "models_options", declared)


def _check_options(
    options: Mapping[str, Any],
    shared: Iterable[str],
    models: Sequence[str],
    key: str,
    declared: Mapping[str, Declaration],
) -> None:
    """Check the options in the setting `key`: options of these models, and RecBole's options `shared`."""
    known = {**recbole_declarations(), **declared}
    known = {name: known[name] for name in set(shared) - set(RECBOLE_FIXED) if name in known}
    own = [model_declarations(model) for model in models]
    for option, value in options.items():
        entries = [each[option] for each in [*own, known] if option in each]
        if not entries:
            similar = nearest(str(option), {*known, *(name for entries in own for name in entries)}, cutoff=0.6)
            raise ValueError(
                f"{key} has the unknown option {option!r:.200} of {', '.join(models) or 'no model'}"
                + (f"; nearest: {', '.join(similar)}" if similar else "")
            )
        for entry in entries:
            check_option(replace(entry, key=f"{key}.{option}"), value)
    _check_negatives(options, declared)


def _check_model(name: str, names: Iterable[str]) -> None:
    kind = recbole_models().get(name, "")
    if name in names:
        return
    if kind:
        raise ValueError(
            f"{name} is a {kind} model, but candidates need scores for the whole catalogue from a user and a history "
            "alone; choose a sequential or a general model such as SASRec, GRU4Rec, BPR or ItemKNN"
        )
    similar = nearest(name, names, cutoff=0.6) or list(names)
    raise ValueError(f"there is no model named {name!r:.200}; nearest: {', '.join(similar)}")


def _check_metrics(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    names = recbole_metrics()
    for name in values["metrics"]:
        if name.lower() not in map(str.lower, names):
            metric, _, cutoff = name.partition("@")
            similar = ", ".join(nearest(metric, names) or names)
            raise ValueError(
                f"metrics has an unknown metric {name!r:.200}; nearest: {similar}"
                + ("; the cut-offs of all metrics are in topk" if cutoff else "")
            )
    if not values["metrics"] or not values["topk"] or any(not isinstance(k, int) or k < 1 for k in values["topk"]):
        raise ValueError(
            f"metrics is {values['metrics']} and topk is {values['topk']}, expected at least one metric "
            "and cut-offs >= 1"
        )
    name, at, cutoff = values["valid_metric"].partition("@")
    whole = name.lower() == "gauc"  # RecBole's only ranking metric without a cut-off
    form = not at if whole else re.fullmatch(r"[1-9][0-9]{0,8}", cutoff)
    if name.lower() not in map(str.lower, names) or not form:
        raise ValueError(
            f"valid_metric is {values['valid_metric']!r:.200}, expected a metric and a cut-off such as NDCG@10"
        )


def _check_protocol(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    protocol, default = values["eval_args"], declared["eval_args"].default
    if unknown := set(protocol) - set(default):
        raise ValueError(f"eval_args has the unknown keys {sorted(map(str, unknown))}, expected {', '.join(default)}")
    full = ("full", {"valid": "full", "test": "full"}, {"valid": "full"}, {"test": "full"})
    split = protocol.get("split")
    if (
        protocol.get("order") != default["order"]
        or protocol.get("mode", "full") not in full
        or not (
            (split == default["split"] and protocol.get("group_by", "user") == "user")
            # Without group_by, RecBole would apply the shares to each user.
            or (_is_temporal(split) and protocol.get("group_by", "user" if "RS" in split else "none") in ("none", None))
        )
    ):
        raise ValueError(
            f"eval_args is {protocol!r:.200}, expected order: TO, mode: full, and split: {{LS: valid_and_test}} with "
            "group_by: user, or split: {RS: [0.8, 0.1, 0.1]} or {date: [VALID, TEST]} with group_by: none: candidates "
            "without leakage are defined for leave-one-out and for cuts of the time of all users, over all items"
        )


def _is_temporal(split: Any) -> bool:
    """Whether a split is RS with three positive shares, or two dates or times."""
    if not isinstance(split, dict) or len(split) != 1:
        return False
    ((name, values),) = split.items()
    if not isinstance(values, list):
        return False
    if name == "RS":
        return len(values) == 3 and all(type(v) in (int, float) and 0 < v < math.inf for v in values)
    return name == "date" and len(values) == 2 and all(type(v) in (int, float, str) for v in values)


# Options of RecBole that drop interactions.
FILTERS = ("rm_dup_inter", "val_interval", "user_inter_num_interval", "item_inter_num_interval")


def _check_benchmark(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    files = values["benchmark_filename"]
    if files is None:
        return
    if len(files) != 3 or len(set(files)) < 3:
        raise ValueError(
            f"benchmark_filename is {files!r:.200}, expected three different names, those of training, validation and "
            "test: [train, valid, test] for <dataset>.train.inter and so on"
        )
    if values["eval_args"]["split"] != declared["eval_args"].default["split"]:
        raise ValueError(
            f"benchmark_filename is {files!r:.200}, and eval_args has the split {values['eval_args']['split']!r:.200}; "
            "remove one of them"
        )
    options = {**recbole_declarations(), **declared}
    filters = [key for key in FILTERS if values.get(key, options[key].default) != options[key].default]
    if filters:
        raise ValueError(
            f"benchmark_filename is {files!r:.200}, and {', '.join(filters)} would drop interactions; ready-made "
            f"splits are not filtered, so set {', '.join(f'{key}: {options[key].default}' for key in filters)}"
        )


def _check_columns(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    defaults = recbole_declarations()
    needed = [values.get(key, defaults[key].default) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
    if len(set(needed)) < len(needed):
        raise ValueError(f"USER_ID_FIELD, ITEM_ID_FIELD and TIME_FIELD are {', '.join(needed)}, expected three columns")
    if fixed := [column for column in needed if column in values.get("numerical_features", [])]:
        raise ValueError(
            f"numerical_features has {', '.join(fixed)}, which the run reads as user, item or time; list other columns"
        )
    for key in ("load_col", "unload_col", "unused_col"):
        for file, columns in (values.get(key) or {}).items():
            texts = isinstance(columns, list) and all(isinstance(column, str) for column in columns)
            if not isinstance(file, str) or not (texts or (columns == "*" and key == "load_col")):
                raise ValueError(f"{key} has {file!r}: {columns!r:.200}, expected a list of columns")
    unused = values.get("unused_col") or {}
    if foreign := set(unused) - set(values["load_col"]):
        raise ValueError(f"unused_col names the files {sorted(foreign)}, of which load_col loads nothing")
    if ids := [column for column in needed[:2] if column in unused.get("inter", [])]:
        raise ValueError(f"unused_col has {', '.join(ids)}, which the run needs")


def _check_value_intervals(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for column, interval in (values["val_interval"] or {}).items():
        tokens = isinstance(interval, list) and all(isinstance(token, str | int | float) for token in interval)
        try:
            if not tokens:
                check_intervals(interval)
        except ValueError as error:
            raise ValueError(f"val_interval has {column}: {interval!r:.200}, expected an interval ({error})") from None


def _check_grades(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["train_grades"] is None:
        return
    (column, thresholds), *more = list(values["train_grades"].items()) or [("", [])]
    numbers = isinstance(thresholds, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        for number in thresholds
    )
    if more or not numbers or not thresholds or thresholds != sorted(set(thresholds)):
        raise ValueError(
            f"train_grades is {values['train_grades']!r:.200}, expected one column and its rising thresholds, "
            "{rating: [3, 5]}"
        )
    loaded = values["load_col"]["inter"]
    if loaded != "*" and column not in loaded:
        raise ValueError(f"train_grades names the column {column!r:.200}, which load_col does not load")


def _check_negatives(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    chosen, default = values.get("train_neg_sample_args"), recbole_declarations()["train_neg_sample_args"].default
    if chosen is None:
        return
    if unknown := set(chosen) - set(default):
        raise ValueError(
            f"train_neg_sample_args has the unknown keys {sorted(map(str, unknown))}, expected {', '.join(default)}"
        )
    merged = {**default, **chosen}
    numbers = {"sample_num": 1, "candidate_num": 1 if merged["dynamic"] else 0, "alpha": 0}
    if (
        merged["distribution"] not in ("uniform", "popularity")
        or not isinstance(merged["dynamic"], bool)
        or any(
            isinstance(merged[name], bool)
            or not isinstance(merged[name], int | float if name == "alpha" else int)
            or not least <= merged[name] <= LARGEST
            for name, least in numbers.items()
        )
    ):
        raise ValueError(
            f"train_neg_sample_args is {chosen!r:.200}, expected distribution uniform or popularity, sample_num >= 1, "
            "alpha >= 0, dynamic True or False, and candidate_num >= 1 if dynamic is True"
        )


def _check_gradients(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    chosen = values["clip_grad_norm"]
    if chosen is not None and (set(chosen) - {"max_norm", "norm_type"} or not chosen.get("max_norm", 0) > 0):
        raise ValueError(f"clip_grad_norm is {chosen!r:.200}, expected for example {{max_norm: 5, norm_type: 2}}")


def _check_gpu(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if not re.fullmatch(r"|-1|(\d+|(GPU|MIG)-[\w/-]+)(,\s*(\d+|(GPU|MIG)-[\w/-]+))*,?", values["gpu_id"]):
        raise ValueError(f"gpu_id is {values['gpu_id']!r:.200}, expected numbers of GPUs such as 0 or 0,1")


def _check_storage(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key in ("save_dataset", "save_dataloaders"):
        if values.get(key):
            raise ValueError(f"{key} is True, but this package stores no data sets of RecBole")


def _check_mix(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    mix, tasks = values["mid_mix"], declared["mid_mix"].default
    if set(mix) - set(tasks):
        raise ValueError(f"mid_mix has unknown tasks {sorted(set(mix) - set(tasks))}, expected {', '.join(tasks)}")
    if not sum(mix.values()) > 0:
        raise ValueError(f"mid_mix is {mix!r}, expected at least one share > 0")


def _check_price(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    unknown = set(values["trace_price"]) - {"prompt", "completion"}
    if unknown:
        raise ValueError(f"trace_price has unknown keys {sorted(unknown)}, expected prompt, completion")


def _check_template(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["prompt_template"]
    names = sorted(file.stem for file in (properties_folder() / "prompt").glob("*.yaml"))
    if name not in names and not (name.endswith((".yaml", ".yml")) and is_file(name)):
        similar = ", ".join(nearest(name, names) or names)
        raise ValueError(f"there is no prompt template {name!r:.200}; nearest: {similar}, or the path of a YAML file")


def _check_endpoint(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    url = values["trace_endpoint"]
    if url is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise ValueError(f"trace_endpoint is {url!r:.200}, expected a URL such as http://localhost:8000/v1")


def _check_temperatures(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key in ("trace_temperature", "onerec_think_temperature"):
        if 0 < values[key] < LEAST_TEMPERATURE:
            raise ValueError(
                f"{key} is {values[key]}, expected 0 or at least {LEAST_TEMPERATURE}: logits would overflow"
            )


# Checks that a declaration cannot express. A check raises ValueError; the key names the source in the message.
Rule = Callable[[Mapping[str, Any], Mapping[str, Declaration]], None]
RULES: dict[str, Rule] = {
    "texts": _check_texts,
    "repeats": _check_repeats,
    "dataset": _check_dataset,
    "model": _check_reranker,
    "base_model": _check_base_model,
    "base_options": _check_base_options,
    "cand_weights": _check_weights,
    "models": _check_models,
    "valid_metric": _check_metrics,
    "eval_args": _check_protocol,
    "benchmark_filename": _check_benchmark,
    "load_col": _check_columns,
    "val_interval": _check_value_intervals,
    "train_grades": _check_grades,
    "train_neg_sample_args": _check_negatives,
    "clip_grad_norm": _check_gradients,
    "gpu_id": _check_gpu,
    "save_dataset": _check_storage,
    "mid_mix": _check_mix,
    "prompt_template": _check_template,
    "trace_price": _check_price,
    "trace_endpoint": _check_endpoint,
    "temperature": _check_temperatures,
}


def _check_random_levels(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["sid_random_last"] >= values["sid_levels"]:
        raise ValueError(
            f"sid_random_last is {values['sid_random_last']}, expected less than sid_levels ({values['sid_levels']})"
        )


def _check_requests(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["train_requests"] > 1 and values["train_targets"] > 1:
        raise ValueError(
            f"train_requests is {values['train_requests']}, and train_targets is {values['train_targets']}; set one of "
            "them to 1: several requests of a user have one target each"
        )


def _check_pool(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    pool, count = values["cand_pool"], values["cand_num"]
    if pool is not None and pool < count:
        raise ValueError(f"cand_pool is {pool}, expected at least cand_num ({count})")
    if pool is not None and pool > count and values["cand_ranker"] != "none" and not values["prior_features"]:
        raise ValueError(
            f"cand_ranker is {values['cand_ranker']}, but prior_features is []; "
            "set cand_ranker to none, or name features"
        )


def _check_buffer(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    buffer, longest = values["rl_overlong_buffer"], values["prompt_max_reasoning"]
    if 0 < longest < buffer:
        raise ValueError(f"rl_overlong_buffer is {buffer}, expected at most prompt_max_reasoning ({longest})")


def _check_items(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    items, default = values["prompt_items"], declared["prompt_template"].default
    if values["score_invariant"] and "score" in values["eval_rows"] and values["prompt_template"] != default:
        raise ValueError(
            "score_invariant is True, and its prompts have their own template, but prompt_template is "
            f"{values['prompt_template']!r:.200}; leave one of them out"
        )
    if items != declared["prompt_items"].default and values["prompt_template"] != default:
        raise ValueError(
            f"prompt_items is {items}, which has its own template, but prompt_template is "
            f"{values['prompt_template']!r:.200}; leave one of them out"
        )
    if items != "vector":
        return
    if generating := [name for name in values["eval_rows"] if name in GENERATING]:
        raise ValueError(
            f"prompt_items is vector, in which a prompt has no semantic IDs to cite, but eval_rows has "
            f"{', '.join(generating)}, which generate answers; name score instead, or choose text, short or sid"
        )
    if values["llm_lora_rank"]:
        raise ValueError(
            f"prompt_items is vector, but llm_lora_rank is {values['llm_lora_rank']}; set it to 0: the checkpoints of "
            "LoRA do not contain the encoder of the items"
        )


def _check_attempts(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    sampled = values["trace_teacher"] in ("rules", "local_llm", "openai_api")
    if (
        sampled
        and values["trace_mode"] == "rejection"
        and values["trace_tries"] > 1
        and not values["trace_temperature"]
    ):
        raise ValueError(
            f"trace_temperature is 0, and trace_tries is {values['trace_tries']}: all attempts would give the same "
            "reply; set trace_tries to 1, or trace_temperature above 0"
        )


def _check_recorded(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["trace_teacher"] == "recorded" and values["trace_file"] is None:
        raise ValueError("trace_teacher is recorded, but trace_file names no file with its traces")


def _check_heads(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name in values["base_model"]:
        options = {**base_model_properties(name), **values, **values["base_options"].get(name, {})}
        if "n_heads" in options and "hidden_size" in options and "head_size" not in options:
            width, heads = options["hidden_size"], options["n_heads"]
            if not heads or width % heads:
                raise ValueError(f"base_hidden_size is {width}, expected a multiple of base_n_heads ({heads})")


def _check_precision(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name in values["base_model"]:
        precise = values["base_options"].get(name, {}).get("enable_amp", values.get("enable_amp"))
        if precise and model_file(properties_folder(), name):
            raise ValueError(f"base_enable_amp is True, but {name} has no mixed precision")


def _check_loss(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name in values["base_model"]:
        own, options = model_file(properties_folder(), name), {**values, **values["base_options"].get(name, {})}
        if options.get("train_neg_sample_args") is None or not (own or recbole_models().get(name) == SEQUENTIAL):
            continue
        if options.get("loss_type", base_model_properties(name).get("loss_type")) == "CE":
            raise ValueError(
                f"base_train_neg_sample_args is given, but the loss of {name} is CE, over all items; leave it out"
                + ("" if own else ", or set base_loss_type to BPR")
            )


COMBINATIONS: dict[str, Rule] = {
    "sid_random_last": _check_random_levels,
    "cand_pool": _check_pool,
    "train_requests": _check_requests,
    "rl_overlong_buffer": _check_buffer,
    "prompt_items": _check_items,
    "trace_temperature": _check_attempts,
    "trace_file": _check_recorded,
    "train_neg_sample_args": _check_loss,
    "hidden_size": _check_heads,
    "enable_amp": _check_precision,
}
