"""SFT: the mid-trained model learns to answer a prompt with a trace and then the ranking."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from recbole_gr2.errors import GateError
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.backbone import save_backbone
from recbole_gr2.llm.constraint import FREE, Grammar
from recbole_gr2.llm.finetune import Row, finetune
from recbole_gr2.llm.rollout import generate_rankings, prior_tensor, read_answer
from recbole_gr2.prompts import PromptMaker, encode_prompt
from recbole_gr2.ranking import promote
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.evidence import load_requests
from recbole_gr2.stages.midtrain import load_stage_model, new_tokens, use_bf16
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.stages.traces import accepted_traces, answer_grammar, training_requests
from recbole_gr2.store import write_json
from recbole_gr2.types import Prompt, Request, Trace

REASONING, ANSWER = 1, 2


def run(context: Context) -> dict:
    """Writes model/, log.json and samples.json.

    Raises:
        GateError: fewer than `sft_min_ok` of the validation answers are well formed by themselves.
    """
    settings = context.settings
    items = load_items(context.folders["tokenizer"], context.data.items)
    maker = PromptMaker.of(settings, items)
    traces = accepted_traces(context, items)
    requests = [r for r in training_requests(context, items, None, "sft") if r.request_id in traces]
    model, tokenizer = load_stage_model(context, "midtrain")
    grammar = answer_grammar(tokenizer, settings)
    seed = derive_seed(settings["seed"], "sft")
    rows = []
    for request in requests:
        trace, drawn = traces[request.request_id], settings["sft_others"] == "prior" and request.prior != ()
        trace = replace(trace, ranking=taught_ranking(request, trace.ranking, settings["sft_others"], seed))
        rows.append(training_row(maker, request, maker.render(request), trace, tokenizer, grammar, drawn=drawn))
    lengths = [len(row.input_ids) for row in rows]
    context.say(f"{len(rows):,} texts, {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most")
    seed_everything(seed)
    bf16 = use_bf16(settings, model.device.type)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    log = finetune(
        model,
        tokenizer,
        rows,
        context.folder / "checkpoints",
        part_weights={"reasoning": settings["sft_reasoning_weight"], "ranking": settings["sft_ranking_weight"]},
        llm_weight=grammar.llm_weight,
        steps=min(settings["sft_steps"], math.ceil(settings["sft_passes"] * len(rows) / settings["sft_batch_size"])),
        batch_size=settings["sft_batch_size"],
        micro_batch_size=settings["sft_micro_batch_size"],
        learning_rate=settings["sft_learning_rate"],
        warmup_share=settings["sft_warmup_share"],
        max_length=settings["sft_max_length"],
        seed=seed,
        bf16=bf16,
        save_steps=settings["sft_save_steps"],
        say=context.say,
    )
    model = merged(model)
    save_backbone(model, tokenizer, context.folder / "model")
    write_json(context.folder / "log.json", log)

    checked = load_requests(context, "valid", items)
    checked = random.Random(seed).sample(checked, min(settings["sft_check_lists"], len(checked)))
    answers, completions = answer_requests(model, tokenizer, maker, grammar, checked, bf16=bf16)
    statuses = Counter(answer.status for answer in answers)
    share = statuses["ok"] / len(answers)
    write_json(
        context.folder / "samples.json",
        [
            {
                "request_id": r.request_id,
                "prompt": maker.render(r).messages[-1]["content"],
                "completion": tokenizer.decode(c),
                "status": a.status,
            }
            for r, a, c in zip(checked[:5], answers[:5], completions[:5], strict=True)
        ],
    )
    context.say(f"validation answers: {dict(statuses)}; e.g. {answers[0].reasoning[:160]!r}")
    if share < settings["sft_min_ok"]:
        raise GateError(
            f"{share:.0%} of {len(answers)} validation answers end their reasoning by themselves",
            where="sft",
            why="RL cannot rescue a policy that has not learnt the form of an answer",
            do="train longer (sft_steps), raise prompt_max_reasoning, or lower sft_min_ok",
        )
    return {
        "texts": len(rows),
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_max": max(lengths),
        "loss_first": {k: v for k, v in log[0].items() if k.startswith("loss")},
        "loss_last": {k: v for k, v in log[-1].items() if k.startswith("loss")},
        "checked": dict(statuses),
    }


def taught_ranking(request: Request, ranking: Sequence[int], others: str, seed: int) -> tuple[int, ...]:
    """The ranking that a text teaches: what a teacher's puts first, and the others behind it by `others`.

    `prior` draws them from the prior, one after another without putting back (Plackett-Luce). The best that a model can
    learn of them is then nothing, as the prior is added to what it says; from the prior's own order it would learn to
    say the prior once more, as well as it can.
    """
    if others == "teacher" or (others == "prior" and not request.prior):
        return tuple(ranking)
    if others == "base":
        return promote(request.items, ranking[0])
    noise = np.random.default_rng(derive_seed(seed, request.request_id)).gumbel(size=len(request.items))
    drawn = [request.items[n] for n in np.argsort(-(np.array(request.prior) + noise))]
    return promote(drawn, ranking[0])


def training_row(
    maker: PromptMaker,
    request: Request,
    prompt: Prompt,
    trace: Trace,
    tokenizer,
    grammar: Grammar,
    *,
    drawn: bool = False,
) -> Row:
    """Prompt and answer as tokens: no loss on the prompt, part 1 on the trace, part 2 on the mark and the labels.

    A label is a choice among the open ones, under the prior, as it is in generation, and a cited semantic ID one among
    those that the prompt shows, with the label that stands behind it there; what is forced, or cannot be said, carries
    no loss. A trace longer than the grammar allows ends at its limit, or in front of the citation that stands across
    it. Without reasoning (`max_reasoning` 0) the trace is left out.

    Args:
        drawn: candidates that are worth the same stand in the ranking as the prior drew them.
    """
    head = encode_prompt(prompt, tokenizer)
    text = with_labels(trace, maker, request, prompt) if grammar.sid_ids else trace.reasoning
    whole, longest = tokenizer(text, add_special_tokens=False)["input_ids"], max(grammar.max_reasoning - 1, 0)
    reasoning, behind = whole[:longest], whole[longest : longest + 1]
    begin, end = grammar.sid_ids or (None, None)
    if begin in reasoning:
        last = len(reasoning) - 1 - reasoning[::-1].index(begin)
        if end not in reasoning[last:] or set(behind) & set(grammar.label_ids):
            reasoning = reasoning[:last]
    label_of = {request.items[position]: grammar.label_ids[n] for n, position in enumerate(prompt.order)}
    labels = [label_of[item] for item in request.by_gain(trace.ranking)]
    prior = prior_tensor([maker.label_prior(request, prompt)], grammar, torch.device("cpu"))
    said = grammar.phases(
        torch.tensor([[*reasoning, grammar.ranking_id]]),
        torch.tensor([len(labels)]),
        grammar.cited(torch.tensor([head]), prior),
    )
    parts, choices = [REASONING] * len(reasoning), {}
    for place, token in enumerate(reasoning):
        found = zip(said.copies[0, place].tolist(), said.copy_prior[0, place].tolist(), strict=True)
        shown = {one: own for one, own in found if one != FREE}
        if said.only[0, place] != FREE or (shown and token not in shown):
            parts[place] = 0
        elif shown:
            choices[len(head) + place] = shown
    prior_of, first = dict(zip(grammar.label_ids, prior[0].tolist(), strict=True)), len(head) + len(reasoning) + 1
    for place in range(len(labels) - 1):  # the last one is forced
        choices[first + place] = {label: prior_of[label] for label in labels[place:]}
    others = first + len(labels) - request.gains.count(min(request.gains))  # from here on all are worth the same
    return Row(
        input_ids=[*head, *reasoning, grammar.ranking_id, *labels, grammar.eos_id],
        parts=[*[0] * len(head), *parts, ANSWER if grammar.max_reasoning else 0, *[ANSWER] * (len(labels) - 1), 0, 0],
        choices=choices,
        drawn=frozenset(place for place in choices if drawn and place >= others),
    )


def with_labels(trace: Trace, maker: PromptMaker, request: Request, prompt: Prompt) -> str:
    """A trace whose cited candidates have the labels behind them that stand behind their IDs in the prompt."""
    shown = "".join(message["content"] for message in prompt.messages)
    label_of = dict(zip(maker.label_items(request, prompt), prompt.labels, strict=True))
    behind: dict[str, str] = {}
    for item in trace.ranking:  # best first: of two candidates with one ID that one is meant
        sid = sid_text(maker.items[item - 1].sid)
        if sid + label_of[item] in shown:
            behind.setdefault(sid, label_of[item])
    return SID.sub(lambda cited: cited[0] + behind.get(cited[0], ""), trace.reasoning)


def answer_requests(
    model,
    tokenizer,
    maker: PromptMaker,
    grammar: Grammar,
    requests: list[Request],
    *,
    bf16: bool,
    orders: dict[str, tuple[int, ...]] | None = None,
    batch_size: int = 64,
):
    """Greedy answers to requests: (answers, completions), both in the order of the requests.

    Args:
        orders: base positions in the order shown, by request id; by default the maker's own.
    """
    prompts = [maker.render(r, (orders or {}).get(r.request_id)) for r in requests]
    completions = generate_rankings(
        model,
        [encode_prompt(p, tokenizer) for p in prompts],
        [maker.label_prior(r, p) for r, p in zip(requests, prompts, strict=True)],
        grammar=grammar,
        temperature=0.0,
        batch_size=batch_size,
        bf16=bf16,
    )
    answers = [
        read_answer(request, completion, maker.label_items(request, prompt), grammar, tokenizer)
        for request, prompt, completion in zip(requests, prompts, completions, strict=True)
    ]
    return answers, completions
