"""A trained language model as it scores the candidates of requests in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.distributed import share
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.llm.item_vectors import ItemVectors
from recbole_gr2.llm.scoring import ListInput, score_lists
from recbole_gr2.policy import answer_grammar, load_model, use_bf16
from recbole_gr2.prompts import INVARIANT, VECTOR, PromptMaker, encode, encode_chat, encode_prompt, item_prompt, recent
from recbole_gr2.types import Answer, Context, Request


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A language model that orders candidates by the log-probabilities of their labels.

    Attributes:
        model: the language model.
        tokenizer: its tokenizer.
        maker: renders requests as prompts.
        grammar: the tokens of labels and of the ranking mark, and the weight of the model beside the prior.
        bf16: whether to run under bfloat16 autocast.
        batch_size: number of requests that are read together. It does not change the answers.
        invariant: whether candidates do not see each other, so that their input order has no effect.
    """

    model: PreTrainedModel
    tokenizer: Any
    maker: PromptMaker
    grammar: Grammar
    bf16: bool
    batch_size: int = 64
    invariant: bool = False

    @classmethod
    def load(cls, context: Context, stage: str) -> Scorer:
        """Load the model that a stage wrote.

        Args:
            context: a context whose stage needs `stage`.
            stage: name of the stage.
        """
        model, tokenizer = load_model(context.folders[stage])
        if context.settings["prompt_items"] == VECTOR:
            model.item_inputs = ItemVectors.load(context.folders[stage]).to(model.device)
        return cls.of(model, tokenizer, context)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, context: Context) -> Scorer:
        """Return the scorer of a loaded model under the settings of a run."""
        return cls(
            model=model,
            tokenizer=tokenizer,
            maker=PromptMaker.of(context.settings, load_catalog(context)),
            grammar=answer_grammar(tokenizer, context.settings, reasoning=False),
            bf16=use_bf16(context.settings, model.device.type),
            batch_size=context.settings["eval_batch_lists"],
            invariant=context.settings["score_invariant"],
        )

    def layout(self, request: Request, order: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the base positions of the candidates in the order in which the model reads them, (K,).

        In the invariant form this is the order of their ids, so that not even the rounding depends on the input order.

        Args:
            request: the request.
            order: an input order; by default that of the prompt maker.
        """
        if self.invariant:
            return tuple(sorted(range(len(request.items)), key=request.items.__getitem__))
        return self.maker.order(request) if order is None else tuple(order)

    def list_input(self, request: Request, order: Sequence[int] | None = None) -> ListInput:
        """Return a request as the model reads it, without its labels. For `order` see `layout`."""
        order = self.layout(request, order)
        return self._invariant_input(request, order) if self.invariant else self._list_input(request, order)

    def _list_input(self, request: Request, order: tuple[int, ...]) -> ListInput:
        """The prompt and the ranking mark, which predicts the labels."""
        items: dict[str, Any] = {}
        if self.maker.items == VECTOR:
            ids, items = self._item_prompt(VECTOR, request, order)
        else:
            ids = encode_prompt(self.maker.render(request, order), self.tokenizer)
        return ListInput(
            input_ids=[*ids, self.grammar.ranking_id],
            places=[len(ids)] * len(order),
            tokens=self.grammar.label_ids[: len(order)],
            prior=priors(request, order),
            **items,
        )

    def _item_prompt(self, template: str, request: Request, order: tuple[int, ...]) -> tuple[list[int], dict[str, Any]]:
        """Token ids of a prompt in which an item is one position; and items, slots and features of a `ListInput`.

        The items are those of all positions up to the mark that follows the prompt.

        Args:
            template: `vector`, or `invariant`, to which the candidates are added later.
            request: the request.
            order: base positions of the candidates in the order of the input.
        """
        shown, count = recent(request.history, self.maker.history), len(order) if template == VECTOR else 0
        levels = len(self.maker.catalog[0].sid)
        ids, places = item_prompt(template, count, len(shown), levels, self.tokenizer, self.grammar.pad_id)
        candidates = [request.items[position] for position in order]
        items = [0] * (len(ids) + 1)
        for place, item in zip(places, [*candidates[:count], *shown], strict=True):
            items[place] = item
        features = request.features.candidates if request.features else np.zeros((len(order), 0), np.float32)
        return list(ids), {"items": items, "slots": places[:count], "features": features[list(order)].tolist()}

    def _invariant_input(self, request: Request, order: tuple[int, ...]) -> ListInput:
        """The history, and then each candidate with the ranking mark, which predicts the first label.

        With `prompt_items: vector` a candidate and its mark are one position.
        """
        items: dict[str, Any] = {}
        if self.maker.items == VECTOR:
            ids, items = self._item_prompt(INVARIANT, request, order)
            parts: list[list[int]] = [[] for _ in order]
        else:
            messages, texts = self.maker.render_parts(request, order)
            ids, parts = encode_chat(messages, self.tokenizer), [encode(text, self.tokenizer) for text in texts]
        context = len(ids)
        segments, positions, ends = [0] * context, list(range(context)), []
        for number, part in enumerate(parts, start=1):
            ids += [*part, self.grammar.ranking_id]
            segments += [number] * (len(part) + 1)
            positions += range(context, context + len(part) + 1)
            ends.append(len(ids) - 1)
        if items:
            candidates = [request.items[position] for position in order]
            items |= {"items": [*items["items"][:context], *candidates], "slots": ends}
        return ListInput(
            input_ids=ids,
            places=ends,
            tokens=[self.grammar.label_ids[0]] * len(order),
            prior=priors(request, order),
            segments=segments,
            positions=positions,
            **items,
        )

    def log_probs(
        self, requests: Sequence[Request], orders: Mapping[str, Sequence[int]] | None = None
    ) -> list[tuple[float, ...]]:
        """Return the log-probability of each candidate to be the best one, in base order.

        Args:
            requests: the requests.
            orders: for each request id the base positions of its candidates in the order of the prompt; by default the
                order of the prompt maker.
        """
        orders = {r.request_id: self.layout(r, (orders or {}).get(r.request_id)) for r in requests}
        scores = share(
            requests,
            lambda part: score_lists(
                self.model,
                [self.list_input(request, orders[request.request_id]) for request in part],
                pad_id=self.grammar.pad_id,
                llm_weight=self.grammar.llm_weight,
                batch_size=self.batch_size,
                bf16=self.bf16,
            ),
        )
        return [
            tuple(score for _, score in sorted(zip(orders[request.request_id], row, strict=True)))
            for request, row in zip(requests, scores, strict=True)
        ]

    def answer(self, requests: Sequence[Request], orders: Mapping[str, Sequence[int]] | None = None) -> list[Answer]:
        """Return the candidates by descending log-probability; equal ones keep the base order. See `log_probs`."""
        answers = []
        for request, row in zip(requests, self.log_probs(requests, orders), strict=True):
            order = sorted(range(len(row)), key=lambda position, row=row: -row[position])  # type: ignore[misc]
            answers.append(
                Answer(
                    request_id=request.request_id,
                    ranking=tuple(request.items[position] for position in order),
                    first_choice=tuple(np.exp(row).tolist()),
                )
            )
        return answers


def priors(request: Request, order: Sequence[int]) -> list[float]:
    """Return the log-priors of candidates in an order, (K,); zeros without a prior."""
    return [request.prior[position] if request.prior else 0.0 for position in order]
