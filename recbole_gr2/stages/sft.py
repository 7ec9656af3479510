"""SFT: the mid-trained model learns to answer a prompt with a trace and then the ranking (GR2, section 4)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recbole_gr2.artifacts import load_catalog, read_traces
from recbole_gr2.config import Settings
from recbole_gr2.distributed import RANK, check_shares
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.lists import candidate_requests, training_requests
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.llm.grammar import FREE, Grammar, prior_tensor
from recbole_gr2.llm.model import save_language_model
from recbole_gr2.llm.train import Example, finetune
from recbole_gr2.policy import (
    Policy,
    answer_grammar,
    llm_training,
    load_model,
    new_tokens,
    prompt_tokens,
    resolved_bf16,
)
from recbole_gr2.prompts import FIELDS, PromptMaker, encode, encode_prompt, prompt_values, template_of
from recbole_gr2.ranking import promote
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import ADDED, SID, label_tokens, sid_text
from recbole_gr2.store import write_json
from recbole_gr2.types import Context, Prompt, Request, Stage, Trace

REASONING, RANKING = 1, 2  # parts of an example
WARMUP_SHARE = 0.05  # share of the steps in which the learning rate rises. Our choice.


def run(context: Context) -> dict[str, Any]:
    """Write model/, README.md, log.json and samples.json. Several processes may run it together.

    Raises:
        QualityCheckError: fewer than `sft_min_ok` of the validation answers are well formed.
    """
    settings, catalog = context.settings, load_catalog(context)
    maker = PromptMaker.of(settings, catalog)
    traces = read_traces(context.folders["traces"] / "accepted.jsonl", catalog)
    model, tokenizer = load_model(context.folders["midtrain"])
    grammar = answer_grammar(tokenizer, settings)
    seed = derive_seed(settings["seed"], "sft")
    requests, examples = training_requests(context, purpose="sft"), []
    for request in requests:
        if request.request_id in traces:
            trace = traces[request.request_id]
            trace = replace(trace, ranking=target_ranking(request, trace.ranking, seed))
            examples.append(training_example(maker, request, maker.render(request), trace, tokenizer, grammar))
    lengths = [len(example.input_ids) for example in examples]
    context.say(
        f"{len(examples):,} texts with {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most"
    )
    seed_everything(seed)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    batch_size = settings["sft_batch_size"]
    training = llm_training(
        settings,
        steps=min(settings["sft_steps"], math.ceil(settings["sft_passes"] * len(examples) / batch_size)),
        batch_size=batch_size,
        learning_rate=settings["sft_learning_rate"],
        warmup_share=WARMUP_SHARE,
        seed=seed,
    )
    log = finetune(
        model,
        tokenizer,
        examples,
        context.folder / "checkpoints",
        training=training,
        part_weights={"reasoning": settings["sft_reasoning_weight"], "ranking": 1.0},
        llm_weight=grammar.llm_weight,
        max_length=settings["sft_max_length"],
        say=context.say,
    )
    model = merged(model)
    if RANK == 0:
        save_language_model(model, tokenizer, context.folder / "model")
        write_model_card(
            context,
            purpose="answers with reasoning and a ranking, by supervised fine-tuning on traces of a teacher",
            method=context.stage,
            settings=("llm", "prompt_", "sft_"),
        )
        write_json(context.folder / "log.json", log)
    policy = Policy(model=model, tokenizer=tokenizer, maker=maker, grammar=grammar, bf16=training.bf16)
    return {
        "texts": len(examples),
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_max": max(lengths),
        "prompt_tokens": prompt_tokens(settings, catalog, tokenizer, requests),
        "loss_first": {k: v for k, v in log[0].items() if k.startswith("loss")},
        "loss_last": {k: v for k, v in log[-1].items() if k.startswith("loss")},
        "checked": _check_answers(context, policy, seed),
    }


def _check_answers(context: Context, policy: Policy, seed: int) -> dict[str, int]:
    """Answer a sample of validation requests, write samples.json, and return the number of answers by status."""
    settings = context.settings
    requests = candidate_requests(context, "valid")
    requests = random.Random(seed).sample(requests, min(settings["sft_check_lists"], len(requests)))
    answers, completions = policy.answer(requests)
    statuses = Counter(answer.status for answer in answers)
    samples = [
        {
            "request_id": request.request_id,
            "prompt": policy.maker.render(request).messages[-1]["content"],
            "completion": policy.tokenizer.decode(completion),
            "status": answer.status,
        }
        for request, answer, completion in zip(requests[:5], answers[:5], completions[:5], strict=True)
    ]
    if RANK == 0:
        write_json(context.folder / "samples.json", samples)
    context.say(f"validation answers: {dict(statuses)}; for example {answers[0].reasoning[:160]!r}")
    share = statuses["ok"] / len(answers)
    if share < settings["sft_min_ok"]:
        raise QualityCheckError(
            f"{share:.0%} of {len(answers)} validation answers end their reasoning within the token limit",
            where="sft",
            why="reinforcement learning cannot repair a model that has not learned the form of an answer",
            do="train longer (sft_steps), raise prompt_max_reasoning, or lower sft_min_ok",
        )
    return dict(statuses)


def target_ranking(request: Request, ranking: Sequence[int], seed: int) -> tuple[int, ...]:
    """Return the ranking that an example teaches: the first item of the trace, then the others.

    With a prior the others are sampled from it without replacement (Plackett-Luce). The prior is added to the scores of
    the language model, so that the language model learns nothing from these samples. From the prior's own order it
    would learn to repeat the prior. Without a prior the others keep the order of the trace.
    """
    if not request.prior:
        return tuple(ranking)
    noise = np.random.default_rng(derive_seed(seed, request.request_id)).gumbel(size=len(request.items))
    sampled = [request.items[position] for position in np.argsort(-(np.array(request.prior) + noise))]
    return promote(sampled, ranking[0])


def training_example(
    maker: PromptMaker,
    request: Request,
    prompt: Prompt,
    trace: Trace,
    tokenizer: Any,
    grammar: Grammar,
) -> Example:
    """Return prompt and answer as token ids with the part of each token.

    Prompt tokens have no loss. Part 1 is the reasoning, part 2 the ranking mark and the labels. As in generation, a
    label is a choice among the labels that are left, under the prior, and the first tokens of a cited semantic ID are a
    choice among the IDs in the prompt. Tokens that the grammar determines have no loss. Reasoning that is longer than
    the grammar allows is cut at the limit, or before a citation that crosses the limit. Without reasoning
    (`max_reasoning` 0) the example has none.

    If the request has a prior, candidates of equal relevance were sampled from it, and the loss of their labels is the
    cross-entropy to the prior. It has the same expectation as the loss of the samples and less variance.
    """
    head = encode_prompt(prompt, tokenizer)
    text = with_labels(trace, maker, request, prompt) if grammar.sid_ids else trace.reasoning
    whole, longest = encode(text, tokenizer), max(grammar.max_reasoning - 1, 0)
    reasoning, next_token = whole[:longest], whole[longest : longest + 1]
    begin, end = grammar.sid_ids or (None, None)
    if begin in reasoning:
        last = len(reasoning) - 1 - reasoning[::-1].index(begin)
        if end not in reasoning[last:] or set(next_token) & set(grammar.label_ids):
            reasoning = reasoning[:last]
    label_of = {request.items[position]: grammar.label_ids[n] for n, position in enumerate(prompt.order)}
    labels = [label_of[item] for item in request.sorted_by_grade(trace.ranking)]
    prior = prior_tensor([maker.label_prior(request, prompt)], grammar, torch.device("cpu"))
    phases = grammar.phases(
        torch.tensor([[*reasoning, grammar.ranking_id]]),
        torch.tensor([len(labels)]),
        grammar.cited(torch.tensor([head]), prior),
    )
    parts: list[int] = [REASONING] * len(reasoning)
    choices: dict[int, dict[int, float]] = {}
    for place, token in enumerate(reasoning):
        copies = zip(phases.copies[0, place].tolist(), phases.copy_prior[0, place].tolist(), strict=True)
        allowed = {one: log_prior for one, log_prior in copies if one != FREE}
        if phases.only[0, place] != FREE or (allowed and token not in allowed):
            parts[place] = 0
        elif allowed:
            choices[len(head) + place] = allowed
    prior_of, first = dict(zip(grammar.label_ids, prior[0].tolist(), strict=True)), len(head) + len(reasoning) + 1
    for place in range(len(labels) - 1):  # the last label is determined
        choices[first + place] = {label: prior_of[label] for label in labels[place:]}
    equal = first + len(labels) - request.relevance.count(min(request.relevance))  # from here all are equally relevant
    return Example(
        input_ids=[*head, *reasoning, grammar.ranking_id, *labels, grammar.eos_id],
        parts=[
            *[0] * len(head),
            *parts,
            RANKING if grammar.max_reasoning else 0,
            *[RANKING] * (len(labels) - 1),
            0,
            0,
        ],
        choices=choices,
        from_prior=frozenset(place for place in choices if request.prior and place >= equal),
    )


def with_labels(trace: Trace, maker: PromptMaker, request: Request, prompt: Prompt) -> str:
    """Return the reasoning with the label of each cited candidate after its semantic ID, as in the prompt."""
    content = "".join(message["content"] for message in prompt.messages)
    label_of = dict(zip(maker.label_items(request, prompt), prompt.labels, strict=True))
    label_after: dict[str, str] = {}
    for item in trace.ranking:  # of two candidates with the same semantic ID the better one is meant
        sid = sid_text(maker.catalog.item(item).sid)
        if sid + label_of[item] in content:
            label_after.setdefault(sid, label_of[item])
    return SID.sub(lambda match: match[0] + label_after.get(match[0], ""), trace.reasoning)


def check_settings(settings: Settings) -> None:
    """Check that the processes can share a step, and that the semantic IDs and labels alone fit `sft_max_length`."""
    check_shares("sft_batch_size", settings["sft_batch_size"])
    template = template_of(settings)
    empty, sid = dict.fromkeys(FIELDS, ""), sid_text((0,) * settings["sid_levels"])
    labels = label_tokens(settings["cand_num"])
    messages = template.messages([empty | {"sid": sid}], [empty | {"sid": sid, "label": label} for label in labels])
    least = sum(len(ADDED.findall(message["content"])) for message in messages) + len(labels) + 2
    if settings["sft_max_length"] < least:
        raise ConfigurationError(
            f"sft_max_length is {settings['sft_max_length']}, and every training text has more than {least} tokens",
            where="sft_max_length",
            why=f"the semantic IDs and labels of a list of {len(labels)} candidates alone are that long",
            do="raise sft_max_length, or lower cand_num",
        )


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hash of the prompt template, and whether the model trains in bfloat16."""
    return {**prompt_values(settings), **resolved_bf16(settings)}


STAGE = Stage(
    name="sft",
    version=8,
    run=run,
    settings=(
        "sft_",
        "cand_num",
        "cand_ranker",
        "prompt_",
        "llm_lora_rank",
        "llm_bf16",
        "llm_micro_batch_size",
        "seed",
    ),
    excluded=("prompt_items",),  # the key has it if it is not the default
    needs=("tokenizer", "prior", "midtrain", "traces"),
    distributed=True,
    amount="sft_steps",
    tokens=lambda settings: settings["sft_steps"] * settings["sft_batch_size"] * settings["sft_max_length"],
    check=check_settings,
    key_values=key_values,
)
