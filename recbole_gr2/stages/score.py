"""Score: the mid-trained model learns to score all candidates of a list in one forward pass.

It learns from the train requests that contain their target. It needs no traces, because it does not reason.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recbole_gr2.artifacts import load_catalog, read_embeddings
from recbole_gr2.config import Settings
from recbole_gr2.distributed import RANK, check_shares
from recbole_gr2.lists import candidate_requests, training_requests
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.llm.item_vectors import ItemEncoder, feature_scale, item_groups
from recbole_gr2.llm.model import save_language_model
from recbole_gr2.llm.scoring import ListInput, listwise_loss, train_lists
from recbole_gr2.policy import llm_training, load_model, new_tokens, prompt_tokens, resolved_bf16
from recbole_gr2.prompts import VECTOR, prompt_values, shuffled_order
from recbole_gr2.scorer import Scorer
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.store import write_json
from recbole_gr2.types import Context, Request, Stage

WARMUP_SHARE = 0.05  # share of the steps in which the learning rate rises. Our choice.
CHECKED = 256  # largest number of validation lists whose cross-entropy is reported. Our choice.


def run(context: Context) -> dict[str, Any]:
    """Write model/, README.md and log.json, and with `prompt_items: vector` items.safetensors.

    Several processes may run it together.
    """
    settings = context.settings
    model, tokenizer = load_model(context.folders["midtrain"])
    scorer = Scorer.of(model, tokenizer, context)
    requests = training_requests(context, purpose="score")
    lists = [training_list(scorer, request) for request in requests]
    lengths = [len(each.input_ids) for each in lists]
    context.say(f"{len(lists):,} lists with {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most")
    seed = derive_seed(settings["seed"], "score")
    seed_everything(seed)
    if settings["prompt_items"] == VECTOR:
        model.item_inputs = item_encoder(context, model, tokenizer, requests)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    log = train_lists(
        model,
        tokenizer,
        lists,
        context.folder / "checkpoints",
        training=llm_training(
            settings,
            steps=settings["score_steps"],
            batch_size=settings["score_batch_size"],
            learning_rate=settings["score_learning_rate"],
            warmup_share=WARMUP_SHARE,
            seed=seed,
        ),
        loss=settings["score_loss"],
        llm_weight=scorer.grammar.llm_weight,
        say=context.say,
    )
    model = merged(model)
    if settings["prompt_items"] == VECTOR:
        vectors = model.item_inputs.catalogue(model.get_input_embeddings())
        del model.item_inputs  # it is no part of the language model
    if RANK == 0:
        save_language_model(model, tokenizer, context.folder / "model")
        if settings["prompt_items"] == VECTOR:
            vectors.save(context.folder)
        write_model_card(
            context,
            purpose="scores of all candidates of a list in one forward pass, without reasoning",
            method=context.stage,
            settings=("llm", "prompt_", "score_"),
        )
        write_json(context.folder / "log.json", log)
    if settings["prompt_items"] == VECTOR:
        model.item_inputs = vectors
    return {
        "lists": len(lists),
        "tokens_mean": float(np.mean(lengths)),
        "tokens_max": max(lengths),
        "prompt_tokens": prompt_tokens(settings, scorer.maker.catalog, tokenizer, requests),
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "valid": _validation(context, replace(scorer, model=model), seed),
    }


def item_encoder(context: Context, model: Any, tokenizer: Any, requests: Sequence[Request]) -> ItemEncoder:
    """Return the untrained encoder of the items of a run."""
    catalog = load_catalog(context)
    codes = tokenizer([sid_text(item.sid) for item in catalog], add_special_tokens=False)["input_ids"]
    features = [request.features.candidates for request in requests if request.features]
    encoder = ItemEncoder(
        read_embeddings(context.folders["embeddings"]),
        np.array(codes)[:, 1:-1],
        item_groups(catalog),
        features[0].shape[1] if features else 0,
        model.get_input_embeddings().embedding_dim,
    )
    if features:
        encoder.mean, encoder.scale = feature_scale(features)
    return encoder.to(model.device)


def training_list(scorer: Scorer, request: Request) -> ListInput:
    """Return a train request as the model reads it, with the relevance of its candidates as labels of the loss."""
    order = scorer.layout(request)
    return replace(
        scorer.list_input(request, order), relevance=[float(request.relevance[position]) for position in order]
    )


def _validation(context: Context, scorer: Scorer, seed: int) -> dict[str, Any]:
    """Figures of validation lists that contain their target.

    Returns:
        `lists`, their number; `score` and `prior`, the cross-entropy of the model and of the prior alone in nats;
        `changed` and `first_changed`, the shares of lists whose order and whose first item change if the input order is
        a random one.
    """
    requests = [request for request in candidate_requests(context, "valid") if request.has_signal]
    requests = random.Random(seed).sample(requests, min(CHECKED, len(requests)))
    if not requests:
        return {"lists": 0}
    orders = {request.request_id: shuffled_order(request, seed, "input order") for request in requests}
    scores, shuffled = scorer.log_probs(requests), scorer.log_probs(requests, orders)
    places = [[np.argsort(-np.array(row), kind="stable") for row in rows] for rows in (scores, shuffled)]
    changed = [one != other for one, other in zip(*places, strict=True)]
    return {
        "lists": len(requests),
        "score": _cross_entropy(requests, scores),
        "prior": _cross_entropy(requests, [request.prior or [0.0] * len(request.items) for request in requests]),
        "changed": float(np.mean([each.any() for each in changed])),
        "first_changed": float(np.mean([each[0] for each in changed])),
    }


def _cross_entropy(requests: Sequence[Request], scores: Sequence[Sequence[float]]) -> float:
    """Mean cross-entropy of the labels of lists."""
    losses = [
        listwise_loss(torch.tensor([row]), torch.tensor([request.relevance], dtype=torch.float32)).item()
        for request, row in zip(requests, scores, strict=True)
    ]
    return float(np.mean(losses))


def check_settings(settings: Settings) -> None:
    """Check that the processes can share a step."""
    check_shares("score_batch_size", settings["score_batch_size"])


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hash of the prompt template, and whether the model trains in bfloat16."""
    return {**prompt_values(settings), **resolved_bf16(settings)}


def stages(settings: Settings) -> list[Stage]:
    """Declare the stage. It reads the text embeddings if an item is one position."""
    return [
        Stage(
            name="score",
            version=1,
            run=run,
            settings=(
                "score_",
                "cand_num",
                "cand_ranker",
                "prompt_",
                "llm_lora_rank",
                "llm_bf16",
                "llm_micro_batch_size",
                "seed",
            ),
            excluded=("prompt_items",),  # the key has it if it is not the default
            needs=(
                "tokenizer",
                "prior",
                "midtrain",
                *(["embeddings"] if settings["prompt_items"] == VECTOR else []),
            ),
            amount="score_steps",
            check=check_settings,
            key_values=key_values,
            distributed=True,
        )
    ]
