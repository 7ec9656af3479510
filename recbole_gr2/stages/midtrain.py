"""Mid-training: the language model learns what semantic IDs stand for and how they follow each other.

`recbole_gr2.tasks` describes the texts. Training has two phases (OneRec-Think, section 3.1): first the embeddings of
the new tokens on the persona task, with all other weights frozen; then all weights, or LoRA, on the mix of the tasks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.config import Settings
from recbole_gr2.distributed import RANK, check_shares
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.llm.adapter import merged, new_rows_alone, with_lora
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.llm.download import check_name, identity
from recbole_gr2.llm.likelihood import perplexity
from recbole_gr2.llm.model import RANDOM, device, load_language_model, random_config, save_language_model
from recbole_gr2.llm.train import finetune
from recbole_gr2.llm.vocabulary import start_from_codebooks
from recbole_gr2.policy import llm_training, new_tokens, resolved_bf16, sid_trie, use_bf16, whole_midtrain
from recbole_gr2.prompts import SEQUENTIAL, templates_for
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.methods import load_codebooks
from recbole_gr2.sid.tokens import added_tokens, code_tokens
from recbole_gr2.store import check_text, file_hash, text_hash, write_json
from recbole_gr2.tasks import (
    check_mix,
    examples_of,
    general_source,
    general_texts,
    share_of,
    split_text,
    task_texts,
    vocabulary_texts,
)
from recbole_gr2.types import Context, Stage

STAGE_NAME = "midtrain"  # also the method that ranks by the likelihood of this stage's model
WARMUP_SHARE = 0.05  # share of the steps in which the learning rate rises. Our choice.


def run(context: Context) -> dict[str, Any]:
    """Write model/, README.md, log.json and samples.json. Several processes may run it together.

    The parameter `hold_out` says whether the targets of the train requests are left out, by default `mid_hold_out`.

    Raises:
        QualityCheckError: the loss or the perplexity is not finite, or the embeddings of the new tokens did not change.
    """
    settings = context.settings
    catalog = load_catalog(context)
    seed = derive_seed(settings["seed"], "midtrain")
    seed_everything(seed)
    general_tokens = settings["mid_tokens"] * share_of("general", settings["mid_mix"])
    general, held_out = general_texts(settings["mid_general"], general_tokens, seed)
    model, tokenizer = load_language_model(
        settings["llm"],
        layers=settings["llm_layers"],
        seed=seed,
        random_config=settings["llm_random"],
        corpus=vocabulary_texts(catalog, settings) + general + held_out,
        trim=settings["llm_trim_vocabulary"] and settings["llm"] != RANDOM,
        extra_tokens=added_tokens(settings["sid_levels"], settings["sid_codes"], settings["cand_num"]),
    )
    if settings["mid_codebooks"]:
        codes = tokenizer.convert_tokens_to_ids(code_tokens(settings["sid_levels"], settings["sid_codes"]))
        start_from_codebooks(model, torch.tensor(codes), load_codebooks(context.folders["tokenizer"], settings), seed)
    model.to(device())
    parameters = sum(p.numel() for p in model.parameters())
    context.say(f"{settings['llm']}: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
    bf16 = use_bf16(settings, device())
    longest = settings["mid_max_length"]
    unseen = [ids for text in held_out for ids in split_text(["", text], tokenizer, longest)]
    language = {"before": perplexity(model, unseen, pad_id=tokenizer.pad_token_id, bf16=bf16)}

    before = model.get_input_embeddings().weight[new_tokens(tokenizer)].detach().clone()
    training = llm_training(
        settings,
        batch_size=settings["mid_batch_size"],
        learning_rate=settings["mid_learning_rate"],
        warmup_share=WARMUP_SHARE,
        seed=seed,
    )
    options = {"max_length": longest, "trie": sid_trie(settings, tokenizer, catalog), "say": context.say}
    hold_out = context.parameters.get("hold_out", settings["mid_hold_out"])
    histories = context.data.known_items("hold_out" if hold_out else "train")
    texts = task_texts(catalog, histories, general, settings)
    first = examples_of(texts, tokenizer, {"persona": 1.0}, settings["mid_embedding_tokens"], longest, seed)
    logs = []
    if first["persona"]:
        context.say(f"phase 1, embeddings of the new tokens: {len(first['persona']):,} texts")
        with new_rows_alone(model, new_tokens(tokenizer)):
            logs += finetune(
                model,
                tokenizer,
                first["persona"],
                context.folder / "checkpoints" / "embeddings",
                part_weights={"persona": 1.0},
                training=replace(training, learning_rate=settings["mid_embedding_learning_rate"]),
                **options,
            )
    examples = examples_of(texts, tokenizer, settings["mid_mix"], settings["mid_tokens"], longest, seed)
    context.say(f"phase 2, all weights: {sum(map(len, examples.values())):,} texts")
    seed_everything(seed)  # the weights of LoRA must not depend on the training of phase 1
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    logs += finetune(
        model,
        tokenizer,
        [example for task in examples.values() for example in task],
        context.folder / "checkpoints" / "all",
        part_weights=dict.fromkeys(examples, 1.0),
        training=training,
        **options,
    )
    model = merged(model)
    change = (model.get_input_embeddings().weight[new_tokens(tokenizer)] - before).norm(dim=1)
    if not bool((change > 0).any()):
        raise QualityCheckError(
            "the embeddings of the new tokens did not change",
            where="midtrain",
            why="the model has learned nothing about semantic IDs",
            do="raise mid_learning_rate or mid_tokens",
        )
    language["after"] = perplexity(model, unseen, pad_id=tokenizer.pad_token_id, bf16=bf16)
    if not math.isfinite(language["after"]):
        raise QualityCheckError(
            f"the perplexity of plain text is {language['after']} after mid-training",
            where="midtrain",
            why="the language model has lost what it knew, and its weights are unusable",
            do="lower mid_learning_rate or mid_embedding_learning_rate",
        )
    context.say(
        f"perplexity of {sum(map(len, unseen)):,} held-out tokens of plain text: "
        f"{language['before']:.1f} before, {language['after']:.1f} after"
    )
    if RANK == 0:
        save_language_model(model, tokenizer, context.folder / "model")
        targets = "without the targets of the train requests" if hold_out else "with all training interactions"
        write_model_card(
            context,
            purpose=f"semantic IDs, histories and item texts ({targets}), before it learns to answer prompts",
            method=context.stage if context.stage == STAGE_NAME else None,
            settings=("llm", "mid_"),
        )
        write_json(context.folder / "log.json", logs)
        write_json(
            context.folder / "samples.json",
            {task: tokenizer.decode(part[0].input_ids) for task, part in examples.items() if part},
        )
    return {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "bf16": bf16,
        "tokens": {task: sum(len(example.input_ids) for example in part) for task, part in examples.items()},
        "texts": {task: len(part) for task, part in examples.items()},
        "embedding_tokens": sum(len(example.input_ids) for example in first["persona"]),
        "loss_last": {k: v for k, v in logs[-1].items() if k.startswith("loss")},
        "perplexity": language,
        "changed_embeddings": float((change > 0).float().mean()),
    }


def check_settings(settings: Settings) -> None:
    """Check the texts and their batches, the name of the language model, and the file of the general task."""
    check_shares("mid_batch_size", settings["mid_batch_size"])
    check_mix(settings["mid_mix"])
    least = len(SEQUENTIAL) + 2 * (settings["sid_levels"] + 2) + 1
    if settings["mid_max_length"] < least:
        raise ConfigurationError(
            f"mid_max_length is {settings['mid_max_length']}, expected at least {least}",
            where="mid_max_length",
            why=f"a text has the words {SEQUENTIAL.strip()!r}, two semantic IDs of {settings['sid_levels'] + 2} tokens "
            "and the end",
            do="raise mid_max_length",
        )
    check_name(settings["llm"], where="llm", others=(RANDOM,))
    if settings["llm"] == RANDOM:
        random_config(settings["llm_random"])
    if settings["mid_general"]:
        check_text(settings["mid_general"], where="mid_general")
        general_texts(settings["mid_general"], 0, 0)


def key_values(settings: Settings) -> dict[str, Any]:
    """Return what identifies the language model, the hashes of its texts, and whether it trains in bfloat16.

    The vocabulary covers all built-in prompt templates, so that each of them can be used with the same model. The
    default of the general texts comes with Python and differs between its versions.
    """
    file = settings["mid_general"]
    values: dict[str, Any] = {
        "prompt_templates.sha": " ".join(t.sha for t in templates_for(settings["prompt_template"])),
        "mid_general": file_hash(file, where="mid_general") if file else text_hash(general_source(None)),
        **resolved_bf16(settings),
    }
    if settings["llm"] != RANDOM:
        values["llm"] = identity(settings["llm"], where="llm")
    return values


def stages(settings: Settings) -> list[Stage]:
    """Declare mid-training.

    With `mid_hold_out` there is a second model, `midtrain_all`, which learns from all training interactions. It runs
    only for the recommenders that need it, GR2Generator and OneRec-Think. RecBole's models learn from all training
    interactions, too.
    """
    stage = Stage(
        name=STAGE_NAME,
        version=5,
        run=run,
        settings=("llm", "mid_", "prompt_title_chars", "cand_num", "seed"),
        excluded=("llm_engine",),  # nothing is generated
        needs=("tokenizer",),
        check=check_settings,
        key_values=key_values,
        amount="mid_tokens",
        tokens=lambda settings: settings["mid_tokens"] + settings["mid_embedding_tokens"],
        distributed=True,
    )
    if not settings["mid_hold_out"]:
        return [stage]
    return [stage, replace(stage, name=whole_midtrain(settings), parameters={"hold_out": False})]
