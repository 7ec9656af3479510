"""A trained language model as it answers requests: model, tokenizer, prompt form and answer grammar together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.catalog import Catalog
from recbole_gr2.distributed import share
from recbole_gr2.llm.answers import read_answer
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.generation import TRANSFORMERS, check_engine, generate_completions
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.llm.likelihood import continuation_log_likelihood
from recbole_gr2.llm.model import device, load_saved, uses_bf16
from recbole_gr2.llm.train import Training
from recbole_gr2.prompts import FORMS, VECTOR, PromptMaker, encode_prompt, item_prompt, recent
from recbole_gr2.sid.tokens import RANKING, SID, SID_BEGIN, label_tokens, sid_text
from recbole_gr2.types import Answer, Context, Request, Trace

MEASURED_PROMPTS = 200  # number of prompts whose length is measured


def use_bf16(settings: Mapping[str, Any], device_name: str) -> bool:
    """Return whether to train and generate under bfloat16 autocast. By default the hardware decides."""
    return uses_bf16(settings["llm_bf16"], device_name)


def whole_midtrain(settings: Mapping[str, Any]) -> str:
    """Return the name of the mid-training stage that learns from all training interactions.

    With `mid_hold_out` the stage `midtrain` leaves out the targets of the train requests, because sft and rl learn from
    them later. A recommender that is compared with other recommenders learns from the same interactions as they do.
    """
    return "midtrain_all" if settings["mid_hold_out"] else "midtrain"


def resolved_bf16(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Return the value of `llm_bf16` on this machine, for the key of a stage."""
    return {"llm_bf16": use_bf16(settings, device())}


def llm_training(settings: Mapping[str, Any], **own: Any) -> Training:
    """Return how a stage trains a language model.

    Args:
        settings: settings of the run, whose settings `llm_...` apply to all stages.
        own: the other attributes of the training.
    """
    return Training(
        micro_batch_size=settings["llm_micro_batch_size"],
        gradient_checkpointing=settings["llm_gradient_checkpointing"],
        bf16=use_bf16(settings, device()),
        save_steps=settings["llm_save_steps"],
        **own,
    )


def engine(settings: Mapping[str, Any]) -> str:
    """Return the engine that generates the answers, rollouts and traces of a run. Only this function reads the setting.

    Raises:
        DependencyError: the package of the engine is missing.
        ConfigurationError: the engine does not support several processes.
    """
    name: str = settings["llm_engine"]
    check_engine(name)
    return name


def engine_value(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `llm_engine` for the key of a stage that generates. Keys have it only if it is not the default."""
    name = settings["llm_engine"]
    return {} if name == TRANSFORMERS else {"llm_engine": name}


def load_model(folder: Path) -> tuple[PreTrainedModel, Any]:
    """Load the language model and the tokenizer of a stage's folder on the device of this machine."""
    model, tokenizer = load_saved(folder / "model")
    return model.to(device()), tokenizer


def new_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that this package added. They are the last ones of the vocabulary."""
    return list(range(tokenizer.convert_tokens_to_ids(SID_BEGIN), len(tokenizer)))


def sid_trie(settings: Mapping[str, Any], tokenizer: Any, catalog: Catalog) -> SidTrie | None:
    """Return the trie that the codes of semantic IDs are chosen from, or None for the whole vocabulary."""
    return SidTrie.of(tokenizer, catalog.sids) if settings["mid_constrained"] else None


def answer_grammar(tokenizer: Any, settings: Mapping[str, Any], *, reasoning: bool = True) -> Grammar:
    """Return the grammar of the answers of a run.

    Args:
        reasoning: False for answers that consist of the ranking only.
    """
    return Grammar.of(
        tokenizer,
        RANKING,
        label_tokens(settings["cand_num"]),
        settings["prompt_max_reasoning"] if reasoning else 0,
        grounded=settings["prompt_grounded"],
        levels=settings["sid_levels"],
        llm_weight=settings["prompt_llm_weight"] if settings["prior_features"] else 1.0,
    )


def sid_log_likelihood(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: Mapping[str, Any],
    catalog: Catalog,
    prompts: Sequence[Sequence[int]],
    items: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Return the log-likelihood of items' semantic IDs as continuations of prompts, B lists of K numbers.

    Items of a prompt with the same semantic ID have the same number. Several processes share the prompts, see
    `recbole_gr2.distributed.share`.

    Args:
        prompts: token ids of B prompts.
        items: K item ids for each prompt.
    """
    sids = [tokenizer(sid_text(item.sid), add_special_tokens=False)["input_ids"] for item in catalog]
    scores = share(
        range(len(prompts)),
        lambda part: continuation_log_likelihood(
            model,
            [[*prompts[place], sids[0][0]] for place in part],
            [[sids[item - 1][1:-1] for item in items[place]] for place in part],
            pad_id=tokenizer.pad_token_id,
            batch_size=settings["eval_batch_lists"],
            bf16=use_bf16(settings, model.device.type),
            trie=sid_trie(settings, tokenizer, catalog),
        ),
    )
    for row, part in zip(scores, items, strict=True):  # The rounding of a likelihood depends on its batch.
        first: dict[tuple[int, ...], float] = {}
        row[:] = [first.setdefault(catalog.item(i).sid, score) for i, score in zip(part, row, strict=True)]
    return scores


def prompt_tokens(
    settings: Mapping[str, Any], catalog: Catalog, tokenizer: Any, requests: Sequence[Request]
) -> dict[str, float]:
    """Return the mean number of tokens of a prompt in each form of `prompt_items`, over the first 200 requests.

    Args:
        settings: settings of the run.
        catalog: the catalogue with semantic IDs.
        tokenizer: tokenizer of the language model.
        requests: at least one request.
    """
    measured = {}
    for form in FORMS:
        maker = PromptMaker.of(settings, catalog, form)
        lengths = [len(_encoded(maker, request, tokenizer)) for request in requests[:MEASURED_PROMPTS]]
        measured[form] = round(sum(lengths) / len(lengths), 1)
    return measured


def _encoded(maker: PromptMaker, request: Request, tokenizer: Any) -> Sequence[int]:
    """Token ids of the prompt of a request."""
    if maker.items != VECTOR:
        return encode_prompt(maker.render(request), tokenizer)
    history, levels = len(recent(request.history, maker.history)), len(maker.catalog[0].sid)
    return item_prompt(VECTOR, len(request.items), history, levels, tokenizer, tokenizer.pad_token_id)[0]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A language model that answers requests with reasoning and a ranking.

    Attributes:
        model: the language model.
        tokenizer: its tokenizer.
        maker: renders requests as prompts.
        grammar: the form of the answers.
        bf16: whether to generate under bfloat16 autocast.
        engine: what runs the model, a name in `llm.generation.ENGINES`.
        batch_size: number of requests that are answered together. It does not change the answers.
    """

    model: PreTrainedModel
    tokenizer: Any
    maker: PromptMaker
    grammar: Grammar
    bf16: bool
    engine: str = TRANSFORMERS
    batch_size: int = 64

    @classmethod
    def load(cls, context: Context, stage: str, *, reasoning: bool = True) -> Policy:
        """Load the model that a stage wrote.

        Args:
            context: a context whose stage needs `stage`.
            stage: name of the stage.
            reasoning: False for answers that consist of the ranking only.
        """
        model, tokenizer = load_model(context.folders[stage])
        return cls.of(model, tokenizer, context, reasoning=reasoning)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, context: Context, *, reasoning: bool = True) -> Policy:
        """Return the policy of a loaded model under the settings of a run."""
        return cls(
            model=model,
            tokenizer=tokenizer,
            maker=PromptMaker.of(context.settings, load_catalog(context)),
            grammar=answer_grammar(tokenizer, context.settings, reasoning=reasoning),
            bf16=use_bf16(context.settings, model.device.type),
            engine=engine(context.settings),
            batch_size=context.settings["eval_batch_lists"],
        )

    def answer(
        self, requests: Sequence[Request], orders: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[list[Answer], list[list[int]]]:
        """Return the greedy answers to requests and their token ids, both in the order of the requests.

        Several processes share the requests, see `recbole_gr2.distributed.share`.

        Args:
            requests: the requests.
            orders: for each request id the base positions of its candidates in the order in which the prompt lists
                them; by default the order of the prompt maker.
        """
        prompts = [self.maker.render(r, (orders or {}).get(r.request_id)) for r in requests]
        priors = [self.maker.label_prior(r, prompt) for r, prompt in zip(requests, prompts, strict=True)]
        completions = share(
            range(len(prompts)),
            lambda part: generate_completions(
                self.model,
                [encode_prompt(prompts[place], self.tokenizer) for place in part],
                [priors[place] for place in part],
                grammar=self.grammar,
                temperature=0.0,
                batch_size=self.batch_size,
                bf16=self.bf16,
                engine=self.engine,
            ),
        )
        answers = []
        for request, prompt, (ids, first_choice) in zip(requests, prompts, completions, strict=True):
            items = self.maker.label_items(request, prompt)
            answer = read_answer(request, ids, items, self.grammar, self.tokenizer)
            chances = dict(zip(items, first_choice, strict=True))
            answers.append(replace(answer, first_choice=tuple(chances[item] for item in request.items)))
        return answers, [completion.ids for completion in completions]


def citations(
    texts: Sequence[Trace | Answer], requests: Sequence[Request], catalog: Catalog, history: int
) -> dict[str, Any]:
    """Count the semantic IDs that reasoning cites.

    Args:
        texts: traces or answers, at least one.
        requests: the requests that they answer, in any order.
        catalog: the catalogue with semantic IDs.
        history: number of most recent history items that the prompts contain.

    Returns:
        `grounded`, the share of texts that cite the item that they rank first; `cited`, the number of cited IDs;
        `cited_in_prompt`, the share of them that the prompt contains, or None if no ID is cited.
    """
    by_id = {request.request_id: request for request in requests}
    grounded, in_prompt, cited = 0, 0, 0
    for text in texts:
        request = by_id[text.request_id]
        items = (*recent(request.history, history), *request.items)
        visible = {sid_text(catalog.item(item).sid) for item in items}
        sids = SID.findall(text.reasoning)
        grounded += sid_text(catalog.item(text.ranking[0]).sid) in sids
        in_prompt, cited = in_prompt + sum(sid in visible for sid in sids), cited + len(sids)
    return {"grounded": grounded / len(texts), "cited": cited, "cited_in_prompt": in_prompt / cited if cited else None}
