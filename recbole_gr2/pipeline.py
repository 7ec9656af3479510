"""The run: a literal table of stages, a plan, and a loop."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recbole_gr2.bridge.models import find_model
from recbole_gr2.config import RECBOLE_TRAINING, Settings, base_model_properties, base_model_words, recbole_words
from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.evidence import PROVIDERS, fact_names, find_providers
from recbole_gr2.generator import GENERATOR, ONEREC_THINK
from recbole_gr2.model import READS_SIDS
from recbole_gr2.processes import PLACE, PROCESSES, wait_for_all
from recbole_gr2.prompts import load_template, templates_for
from recbole_gr2.rewards import WeightedRewards
from recbole_gr2.rewards import named as reward_names
from recbole_gr2.stages import Context
from recbole_gr2.stages.rerank import PREFIX
from recbole_gr2.stages.tokenizer import tokenizer_config
from recbole_gr2.store import (
    code_version,
    locked,
    other_records,
    read_manifest,
    stage_key,
    write_json,
    write_manifest,
)
from recbole_gr2.types import StageRecord


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table.

    Attributes:
        name: what it is called in the plan and in its folder; its code is stages/<name>.py unless `code` says another.
        version: raise it when the stage's code changes its result; older folders are then left alone.
        settings: prefixes of the settings that can change its result.
        but: settings with such a prefix that are another stage's.
        needs: stages whose files it reads, whatever the settings.
        recbole: which of RecBole's words can change its result: "" none, "shared" those that are not for the base
            model alone, "base" all of them.
    """

    name: str
    version: int
    settings: tuple[str, ...]
    but: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    recbole: str = ""
    code: str = ""


BASELINE = Stage(
    name="",
    version=1,
    code="baseline",
    recbole="shared",
    settings=("models_", "cand_exclude_seen", "cand_beams", "cand_num", "seed"),
)
BASELINES = {  # those that RecBole does not train
    GENERATOR: Stage(
        name=GENERATOR,
        version=1,
        code="baseline",
        recbole="shared",
        needs=("tokenizer", "midtrain"),
        settings=("cand_exclude_seen", "cand_beams", "cand_num", "seed"),
    ),
    **{
        name: Stage(
            name=name,
            version=3,
            code="baseline",
            recbole="shared",
            needs=("tokenizer", row),
            settings=("cand_exclude_seen", "seed"),
        )
        for name, row in ONEREC_THINK.items()
    },
}
STAGES = (
    Stage(name="embeddings", version=1, settings=("sid_encoder", "text_")),
    Stage(name="tokenizer", version=1, settings=("sid_", "seed"), but=("sid_encoder",), needs=("embeddings",)),
    Stage(
        name="midtrain",
        version=3,
        needs=("tokenizer",),
        settings=("llm", "mid_", "prompt_template", "prompt_title_chars", "cand_num", "seed"),
    ),
    Stage(name="candidates", version=1, settings=("base_model", "cand_", "seed"), recbole="base"),
    Stage(name="evidence", version=4, needs=("candidates", "embeddings"), settings=("evidence_", "seed")),
    Stage(
        name="traces",
        version=6,
        settings=("trace_", "prompt_", "seed"),
        needs=("candidates", "tokenizer", "evidence", "midtrain"),
    ),
    Stage(
        name="sft",
        version=6,
        settings=("sft_", "prompt_", "llm_lora_rank", "llm_bf16", "seed"),
        needs=("candidates", "tokenizer", "evidence", "midtrain", "traces"),
    ),
    Stage(
        name="rl",
        version=7,
        settings=("rl_", "prompt_", "llm_lora_rank", "llm_bf16", "seed"),
        needs=("embeddings", "candidates", "tokenizer", "evidence", "sft"),
    ),
    Stage(
        name="evaluate",
        version=6,
        settings=("eval_", "seed"),
        recbole="base",
        needs=("candidates", "tokenizer", "evidence"),
    ),
)
NAMES = tuple(stage.name for stage in STAGES)
RERANK = Stage(
    name="",
    version=4,
    code="rerank",
    needs=("candidates", "tokenizer", "evidence"),
    settings=("eval_scope", "eval_max_lists", "prompt_", "llm_bf16", "seed"),
)
RERANKERS = {
    "lambdamart": (),
    "midtrain": ("midtrain",),
    "sft": ("sft",),
    "rl": ("rl",),
    "shuffled": ("rl",),
    "distilled": ("distill",),
    "internalised": ("internalise",),
    **{row: (row,) for row in ONEREC_THINK.values()},
}
RL = next(stage for stage in STAGES if stage.name == "rl")
INTERNALISE = replace(
    RL,
    name="internalise",
    code="rl",
    but=("rl_start",),
    needs=("embeddings", "candidates", "tokenizer", "evidence", "rl"),
)
DISTILL = replace(
    RL,
    name="distill",
    version=4,
    code="rl",
    settings=(*RL.settings, "distill_"),
    but=("rl_start", "rl_steps", "rl_mask_truncated"),
    needs=("embeddings", "candidates", "tokenizer", "evidence", "midtrain"),
)
TRAINED_ONEREC_THINK = Stage(
    name="",
    version=1,
    code="onerec_think",
    needs=("embeddings", "tokenizer", "midtrain"),
    settings=("ort_", "prompt_", "llm_lora_rank", "llm_bf16", "seed"),
    but=("prompt_evidence", "prompt_grounded", "prompt_llm_weight"),
)
CLOCK = "clock.json"  # in an unfinished stage's folder: when its last start began, and the seconds of those before
AGAIN = "asked for"  # why a stage runs although it may be finished
SHARED = ("rl",)  # code of the stages that several processes run together
CHOICES = {
    "trace_mode": ("targeted", "rejection"),
    "rl_start": ("sft", "distill"),
    "ort_variant": ("public", "paper"),
    "eval_scope": ("in_list", "all"),
    "sft_others": ("prior", "base", "teacher"),
}
LEAST = {"evidence_fits": 1, "evidence_folds": 2}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage with its key, its folder, what will happen to it, and why."""

    stage: Stage
    key: str
    folder: Path
    needs: dict[str, str]
    settings: dict[str, Any]
    action: str  # cached | resume | run
    why: str


def check(settings: Settings) -> None:
    """What can be told of the settings before any data is loaded, instead of after the stages before them.

    Raises:
        ConfigurationError: a re-ranker, a RecBole model, one of its words, a mode or a reward that there is not, or a
            tokenizer that cannot be built.
    """
    if settings["model"] != "GR2":
        raise ConfigurationError(
            f"model {settings['model']!r} is not the re-ranker",
            where="-m / --model",
            do=f"-m GR2, and --base_model {settings['model']} for the model that proposes the candidates",
        )
    if settings["base_model"] in ONEREC_THINK:
        raise ConfigurationError(
            f"{settings['base_model']} is no base model",
            where="base_model",
            why="it is a baseline, a row of the table, and makes no train lists",
            do="name it in models",
        )
    for name in {settings["base_model"], *settings["models"]} - {GENERATOR, *ONEREC_THINK}:
        find_model(name)
    words = recbole_words() | RECBOLE_TRAINING
    unknown = set(settings["models_words"]) - words.union(*map(base_model_words, settings["models"]))
    if unknown:
        raise ConfigurationError(
            f"no model of {settings['models']} has the words {sorted(unknown)}",
            where="models_words",
            why="RecBole would ignore them without a word",
            do="name words of properties/model/ or of RecBole",
        )
    for key, choices in CHOICES.items():
        if settings[key] not in choices:
            raise ConfigurationError(f"{key} is {settings[key]!r}", do=f"choose from {', '.join(choices)}")
    for key, least in LEAST.items():
        if settings[key] < least:
            raise ConfigurationError(f"{key} is {settings[key]}", do=f"choose {least} or more")
    unknown = set(settings["eval_rows"]) - set(RERANKERS)
    if unknown:
        raise ConfigurationError(
            f"there is no re-ranker {sorted(unknown)}", where="eval_rows", do=f"choose from {', '.join(RERANKERS)}"
        )
    unknown = set(settings["trace_price"]) - {"prompt", "completion"}
    if unknown:
        raise ConfigurationError(f"trace_price has no {sorted(unknown)}", do="write {prompt: 0.1, completion: 0.3}")
    providers = settings["evidence_providers"]
    if settings["prompt_evidence"] and set(providers) <= set(PROVIDERS):  # what others count is known when they ran
        unknown = set(settings["prompt_evidence"]) - set(known := fact_names(providers) if providers else [])
        if unknown:
            raise ConfigurationError(
                f"there are no facts {sorted(unknown)} to show",
                where="prompt_evidence",
                do=f"choose from {', '.join(known)}" if known else "name evidence_providers, which count them",
            )
    if not settings["prompt_llm_weight"] > 0:
        raise ConfigurationError(
            f"prompt_llm_weight is {settings['prompt_llm_weight']}",
            do="choose a number above 0",
            why="at 0 the language model would have no say",
        )
    tokenizer_config(settings)
    WeightedRewards(settings["rl_rewards"])


def stage_table(settings: Settings) -> list[Stage]:
    """STAGES with one more for each of `models`, and for each re-ranker of the table, in front of the last; and with
    distill, internalise and OneRec-Think's where they are asked for.

    So each is trained, and answers, once, whatever the lists. A model that is made from other stages needs those: one
    that trains TIGER also reads semantic IDs, one that uses the generator what mid-training wrote as well.
    """
    materials = _materials(settings["base_model"])
    table = [
        replace(stage, needs=(*stage.needs, *materials)) if stage.name in ("candidates", "evaluate") else stage
        for stage in STAGES
    ]
    models = list(dict.fromkeys(settings["models"]))
    baselines = [BASELINES.get(name, replace(BASELINE, name=name, needs=_materials(name))) for name in models]
    rows = {row: RERANKERS[row] for row in settings["eval_rows"]}
    if not settings["evidence_providers"]:
        rows.pop("lambdamart", None)  # it ranks by them
    rows |= {row: RERANKERS[row] for name, row in ONEREC_THINK.items() if name in models}
    rerankers = [replace(RERANK, name=PREFIX + row, needs=(*RERANK.needs, *needs)) for row, needs in rows.items()]
    last = replace(table[-1], needs=(*table[-1].needs, *models, *(stage.name for stage in rerankers)))
    if "distilled" in rows or settings["rl_start"] == "distill":
        sft = ("sft",) if settings["distill_teacher"] == "sft" else ()
        place = NAMES.index("rl")
        table[place] = replace(RL, needs=(*RL.needs[:-1], settings["rl_start"]))
        table.insert(place, replace(DISTILL, needs=(*DISTILL.needs, *sft)))
    second = [INTERNALISE] if "internalised" in rows else []
    second += [replace(TRAINED_ONEREC_THINK, name=row) for row in ONEREC_THINK.values() if row in rows]
    return [*table[:-1], *second, *baselines, *rerankers, last]


def _materials(model: str) -> tuple[str, ...]:
    """Stages that a recommender is made from."""
    return ("tokenizer", "midtrain") if model == GENERATOR else ("tokenizer",) if model in READS_SIDS else ()


def plan(
    settings: Settings, data: Any, *, stages: Sequence[str] = (), from_stage: str | None = None, force: bool = False
) -> list[Planned]:
    """What each stage would do.

    Args:
        stages: run these alone, and what they need; all by default.
        from_stage: run this stage and those that depend on it again, even if they are finished.
        force: run every stage again.

    Raises:
        ConfigurationError: an unknown stage name.
    """
    table = stage_table(settings)
    needed = {stage.name: stage.needs for stage in table}
    for name in (*stages, *([from_stage] if from_stage else [])):
        if name not in needed:
            raise ConfigurationError(f"there is no stage named {name!r}", do=f"choose from {', '.join(needed)}")
    wanted = set(stages or needed)
    for stage in reversed(table):
        wanted |= set(needed[stage.name]) if stage.name in wanted else set()
    root = Path(settings["checkpoint_dir"]) / "gr2" / settings["dataset"] / "stages"
    planned, keys, renewed = [], {}, set()
    for stage in table:
        if stage.name not in wanted:
            continue
        values = {k: v for k, v in settings.results(stage.settings).items() if k not in stage.but}
        if stage.recbole:
            words = settings.recbole_results(base=stage.recbole == "base")
            values |= {f"recbole.{k}": v for k, v in words.items()}
            model = settings["base_model"] if stage.recbole == "base" else stage.name
            values |= {f"{model}.defaults": base_model_properties(model)}
        if stage.name == "midtrain":  # it learns the words of all built-in templates, and is the same for each of them
            shas = [template.sha for template in templates_for(values.pop("prompt_template"))]
            values["prompt_templates.sha"] = " ".join(shas)
        values |= _extension_hashes(values)
        needs = {name: keys[name] for name in needed[stage.name]}
        key = keys[stage.name] = stage_key(stage.name, stage.version, values, needs, data.fingerprint)
        folder = root / stage.name / key
        if force or stage.name == from_stage or renewed & set(needs):
            renewed.add(stage.name)
        action, why = _decide(folder, values, needs, again=stage.name in renewed)
        planned.append(
            Planned(stage=stage, key=key, folder=folder, needs=needs, settings=values, action=action, why=why)
        )
    return planned


def _decide(folder: Path, values: dict, needs: dict, *, again: bool) -> tuple[str, str]:
    """Cached, resume or run, and the cause."""
    if again:
        return "run", AGAIN
    if read_manifest(folder):
        return "cached", ""
    if folder.is_dir():
        return "resume", "stopped before it was finished"
    for record in other_records(folder)[:1]:
        changes = [
            f"{k} {record.settings.get(k)} -> {values.get(k)}"
            for k in sorted({*values, *record.settings})
            if _plain(record.settings.get(k)) != _plain(values.get(k))
        ]
        changes += [f"new {name}" for name in needs if record.needs.get(name) != needs[name]]
        return "run", "; ".join(changes[:3]) or "data or code changed"
    return "run", "first time"


def _extension_hashes(values: dict[str, Any]) -> dict[str, str]:
    """Content hashes of what a user may edit behind a setting: prompt template, modules, other files."""
    hashes = {}
    if "prompt_template" in values:
        hashes["prompt_template.sha"] = load_template(values["prompt_template"]).sha
    own = {**values, "rl_rewards": reward_names(values.get("rl_rewards", {}))}
    for key in ("trace_teacher", "evidence_providers", "rl_rewards"):
        named = own.get(key) or []
        for name in [named] if isinstance(named, str) else named:
            if ":" in name:
                hashes[f"{name}.sha"] = _file_hash(_module_file(name.split(":")[0], key))
    find_providers(values.get("evidence_providers", ()))  # an unknown one is told now, not after the stages before it
    for key in ("cand_file", "mid_general", "trace_file"):
        if values.get(key):
            hashes[f"{key}.sha"] = _file_hash(values[key])
    teacher = values.get("distill_teacher", "sft")
    if teacher != "sft" and "://" not in teacher:
        hashes["distill_teacher.sha"] = _file_hash(str(Path(teacher) / "model" / "model.safetensors"))
    return hashes


def _module_file(module: str, key: str) -> str:
    """Source file of a module that a setting names; told now, not after the stages before it."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of a package on the way to it
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"there is no module {module!r}", where=key, do="install it, or add its folder to PYTHONPATH"
        )
    return spec.origin


def _file_hash(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise MissingFileError(f"cannot read {file}: {error}", do="check the setting that names it") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def execute(
    planned: Sequence[Planned], settings: Settings, data: Any, console: Console
) -> list[tuple[StageRecord, bool]]:
    """Run what the plan says; returns every stage's record and whether it was cached.

    Raises:
        ConfigurationError: it was started as several processes, and one of the stages that would run is for one.
    """
    alone = [p.stage.name for p in planned if p.action != "cached" and (p.stage.code or p.stage.name) not in SHARED]
    if PROCESSES > 1 and alone:
        raise ConfigurationError(
            f"{', '.join(alone)} would be run by {PROCESSES} processes at once",
            where="accelerate launch",
            why="rl, distill and internalise alone are shared by several processes",
            do="finish the stages before them with one process, then launch --stages rl with several",
        )
    records: dict[str, StageRecord] = {}
    folders: dict[str, Path] = {}
    done = []
    for entry in planned:
        name = entry.stage.name
        with locked(entry.folder) if PLACE == 0 else contextlib.nullcontext():
            # Whatever the plan says, if it was not asked for again: another run may have finished it since.
            record = None if entry.why == AGAIN else read_manifest(entry.folder)
            cached = record is not None
            if not cached:
                record = _run(entry, settings, data, console, records, folders)
        records[name], folders[name] = record, entry.folder
        done.append((record, cached))
        console.say(f"{name} {'cached' if cached else f'done in {record.seconds:.0f} s'}  {entry.folder}")
    return done


def _run(entry: Planned, settings: Settings, data: Any, console: Console, records: dict, folders: dict) -> StageRecord:
    if entry.why == AGAIN and PLACE == 0:
        for path in entry.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    console.say(f"{entry.stage.name}: {entry.action}" + (f" ({entry.why})" if entry.why else ""))
    run = importlib.import_module(f"recbole_gr2.stages.{entry.stage.code or entry.stage.name}").run
    context = Context(
        stage=entry.stage.name,
        settings=settings,
        data=data,
        folder=entry.folder,
        say=lambda text: console.say(f"  {text}"),
        inputs={name: records[name] for name in entry.needs},
        folders={name: folders[name] for name in entry.needs},
    )
    before = _earlier_starts(entry.folder) if PLACE == 0 else 0.0
    wait_for_all()
    _reset_peak_memory()
    code, started = code_version(), time.monotonic()
    facts = run(context)
    if PLACE == 0:
        (entry.folder / CLOCK).unlink()
        _finish(entry, facts, before + time.monotonic() - started, code)
    wait_for_all()
    return read_manifest(entry.folder)  # as a later run reads it: JSON turns tuples into lists


def _earlier_starts(folder: Path) -> float:
    """Seconds of the starts of a stage that were stopped, each up to the last file that it left; and notes this start.

    A checkpoint cannot know when its run will be stopped. What a start did after its last file was lost, and counts
    where it is done again.
    """
    clock, before = folder / CLOCK, 0.0
    if clock.is_file():
        last = json.loads(clock.read_text(encoding="utf-8"))
        left = max(f.stat().st_mtime for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
        before = last["before"] + max(0.0, left - last["started"])
    write_json(clock, {"started": time.time(), "before": before})
    return before


def _finish(entry: Planned, facts: dict, seconds: float, code: str) -> None:
    for checkpoint in entry.folder.glob("checkpoints/**/checkpoint-*"):  # of no use once the stage is finished
        shutil.rmtree(checkpoint)
    record = StageRecord(
        stage=entry.stage.name,
        key=entry.key,
        version=entry.stage.version,
        needs=entry.needs,
        settings=entry.settings,
        seconds=round(seconds, 3),
        peak_memory_mb=round(_peak_memory_mb()),
        facts=facts,
        files=tuple(sorted(str(f.relative_to(entry.folder)) for f in entry.folder.rglob("*") if f.is_file())),
        code=code,
    )
    write_manifest(entry.folder, record)


def _reset_peak_memory() -> None:
    """Start the peak anew, where the system can (Linux: writing 5 to clear_refs resets VmHWM)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _peak_memory_mb() -> float:
    """Largest resident memory of this process since the last reset, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
