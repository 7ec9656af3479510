"""A trained language model as it scores the candidates of requests in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.llm.item_vectors import ItemVectors
from recbole_gr2.llm.scoring import ListInput, score_lists
from recbole_gr2.policy import answer_grammar, load_model, use_bf16
from recbole_gr2.prompts import VECTOR, PromptMaker, encode_items, encode_prompt, recent
from recbole_gr2.types import Answer, Context, Prompt, Request


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
    """

    model: PreTrainedModel
    tokenizer: Any
    maker: PromptMaker
    grammar: Grammar
    bf16: bool
    batch_size: int = 64

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
        )

    def list_input(self, request: Request, order: Sequence[int] | None = None) -> ListInput:
        """Return a request as the model reads it, without its labels.

        Args:
            request: the request.
            order: base positions of the candidates in the order of the prompt; by default that of the prompt maker.
        """
        prompt = self.maker.render(request, order)
        count, items = len(prompt.order), {}
        if self.maker.items == VECTOR:
            ids, places = encode_items(prompt, self.tokenizer, self.grammar.pad_id)
            ids.append(self.grammar.ranking_id)
            items = item_positions(request, prompt, places, len(ids), self.maker.history)
        else:
            ids = [*encode_prompt(prompt, self.tokenizer), self.grammar.ranking_id]
        return ListInput(
            **items,
            input_ids=ids,
            places=[len(ids) - 1] * count,
            tokens=self.grammar.label_ids[:count],
            prior=self.maker.label_prior(request, prompt),
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
        orders = orders or {request.request_id: self.maker.order(request) for request in requests}
        scores = score_lists(
            self.model,
            [self.list_input(request, orders[request.request_id]) for request in requests],
            pad_id=self.grammar.pad_id,
            llm_weight=self.grammar.llm_weight,
            batch_size=self.batch_size,
            bf16=self.bf16,
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


def item_positions(
    request: Request, prompt: Prompt, places: Sequence[int], length: int, history: int
) -> dict[str, Any]:
    """Return items, slots and features of a `ListInput` in the form `vector`.

    Args:
        request: the request.
        prompt: its prompt, with the candidates before the history.
        places: positions of the items of the prompt, in its order.
        length: T, number of positions.
        history: largest number of history items in the prompt.
    """
    count = len(prompt.order)
    shown = [*(request.items[position] for position in prompt.order), *recent(request.history, history)]
    item_at = dict(zip(places, shown, strict=True))
    features = request.features.candidates if request.features else np.zeros((count, 0), np.float32)
    return {
        "items": [item_at.get(place, 0) for place in range(length)],
        "slots": places[:count],
        "features": features[list(prompt.order)].tolist(),
    }
