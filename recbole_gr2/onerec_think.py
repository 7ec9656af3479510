"""OneRec-Think (arXiv 2510.11639), a baseline: prompts, traces and scores of the trained models.

Mid-training is its itemic alignment. Like the other recommenders, it learns from all training interactions, so it
starts from the model of `policy.whole_midtrain`. `onerec_think` is fine-tuned from this model to answer a history with
`<think> trace </think>` and the semantic ID of the next item. `onerec_think-no-think` answers the same prompts with the
semantic ID only. Each re-ranks candidates by the likelihood of their semantic IDs after each sampled trace, and
recommends from the whole catalogue by beam search. An item counts with its best trace, since the released code removes
duplicates.

The variant `public` follows the released code: a trace is one sentence that names the category of the next item. The
variant `paper` follows the paper: a trace is a rationale that the mid-trained model writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.bridge.generative import Generator
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import ONEREC_THINK
from recbole_gr2.llm.generation import generate_rankings
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.policy import load_model, sid_log_likelihood, use_bf16
from recbole_gr2.prompts import TEXT, PromptMaker, encode, recent, sequential_ids
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import SID_BEGIN
from recbole_gr2.tasks import PERSONA, describe
from recbole_gr2.types import Context, Request

THINK, END_OF_THINK = "<think>", "</think>"
MAX_SIDS = 30  # most recent history items in a prompt as semantic IDs, about as many as in a mid-training text


def reasons(method: str) -> bool:
    """Return whether this is the model with traces."""
    return not method.endswith("-no-think")


def prompt_maker(settings: Mapping[str, Any], catalog: Catalog) -> PromptMaker:
    """Return the prompt maker; `onerec_think_texts` items of a history are written with their texts."""
    return replace(PromptMaker.of(settings, catalog, TEXT), history=settings["onerec_think_texts"])


def trace_grammar(tokenizer: Any, settings: Mapping[str, Any]) -> Grammar:
    """Return the grammar of a trace: free text, `</think>`, and the token that begins a semantic ID."""
    return Grammar.of(tokenizer, END_OF_THINK, [SID_BEGIN], settings["onerec_think_max_trace"])


def prompt_ids(maker: PromptMaker, tokenizer: Any, history: Sequence[int]) -> list[int]:
    """Return the token ids of a history, up to where the next item begins.

    The last items have their texts, as in the persona task of mid-training. All items follow as semantic IDs, as in its
    sequential task. The pieces are tokenised separately, as in mid-training.
    """
    texts = (f"\n{describe(maker.fields(item))}" for item in recent(history, maker.history))
    pieces = [encode(text, tokenizer) for text in (PERSONA, *texts, "\n")]
    sids = sequential_ids(recent(history, MAX_SIDS), maker.catalog, tokenizer)
    return [token for ids in pieces for token in ids] + sids


def prompts_with_traces(
    model: PreTrainedModel,
    tokenizer: Any,
    maker: PromptMaker,
    settings: Mapping[str, Any],
    with_traces: bool,
    histories: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Return prompts that the next item continues: B histories give B * S prompts, the S of a history together.

    S is `onerec_think_samples`, the number of sampled traces; without traces it is 1. A trace depends on the seed, the
    history and its number only.
    """
    heads = [prompt_ids(maker, tokenizer, history) for history in histories]
    if not with_traces or not settings["onerec_think_max_trace"]:
        return heads
    grammar = trace_grammar(tokenizer, settings)
    samples = settings["onerec_think_samples"]
    starts = [[*head, tokenizer.convert_tokens_to_ids(THINK)] for head in heads]
    completions = generate_rankings(
        model,
        starts,
        [[0.0]] * len(starts),
        grammar=grammar,
        num_generations=samples,
        temperature=settings["onerec_think_temperature"],
        batch_size=settings["eval_batch_lists"],
        seed=derive_seed(settings["seed"], "onerec_think"),
        bf16=use_bf16(settings, model.device.type),
    )
    ends = (tokenizer.convert_tokens_to_ids(SID_BEGIN), grammar.eos_id)
    assert all(tuple(completion[-2:]) == ends for completion in completions)
    return [starts[number // samples] + completion[:-2] for number, completion in enumerate(completions)]


def onerec_think_recommender(context: Context, name: str) -> Generator:
    """Return a trained model as a recommender from the whole catalogue.

    Args:
        context: a context whose stage needs the stage that trained the model.
        name: name of the recommender, one of `ONEREC_THINK`.
    """
    settings, catalog, stage = context.settings, load_catalog(context), ONEREC_THINK[name]
    model, tokenizer = load_model(context.folders[stage])
    maker = prompt_maker(settings, catalog)
    return Generator(
        name=name,
        model=model,
        tokenizer=tokenizer,
        data=context.data,
        exclude_seen=settings["cand_exclude_seen"],
        metadata={"model": name, "hold_out": False},
        catalog=catalog,
        beams=search_width(settings),
        constrained=settings["mid_constrained"],
        batch_size=settings["eval_batch_lists"],
        bf16=use_bf16(settings, model.device.type),
        prompts=partial(prompts_with_traces, model, tokenizer, maker, settings, reasons(stage)),
    )


def search_width(settings: Mapping[str, Any]) -> int:
    """Return the number of beams of the recommender, so that each user gets enough items for the metrics."""
    return max(settings["onerec_think_beams"], *settings["topk"])


def candidate_scores(
    context: Context, method: str, model: PreTrainedModel, tokenizer: Any, requests: Sequence[Request]
) -> list[list[float]]:
    """Return the log-likelihood of each candidate's semantic ID, B lists of K: the best over the sampled traces.

    The beam search of the recommender gives the same item the same log-likelihood.

    Args:
        context: context of the re-ranker.
        method: name of the method.
        model: its language model.
        tokenizer: the tokenizer of the model.
        requests: B requests.
    """
    settings, catalog = context.settings, load_catalog(context)
    histories = [request.history for request in requests]
    maker = prompt_maker(settings, catalog)
    prompts = prompts_with_traces(model, tokenizer, maker, settings, reasons(method), histories)
    samples = len(prompts) // max(len(requests), 1)
    items = [request.items for request in requests for _ in range(samples)]
    scores = sid_log_likelihood(model, tokenizer, settings, catalog, prompts, items)
    return [np.max(scores[n * samples : (n + 1) * samples], axis=0).tolist() for n in range(len(requests))]
