"""Methods that rank candidates by the likelihood of their semantic IDs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from recbole_gr2.onerec_think import candidate_scores
from recbole_gr2.policy import load_model, sid_log_likelihood
from recbole_gr2.prompts import history_ids
from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.types import Request


class _Likelihood(Reranker):
    """A method with a language model of the stage that `needs` names."""

    trained = True
    distributed = True

    @cached_property
    def model(self) -> tuple[PreTrainedModel, Any]:
        """The language model and its tokenizer. They are loaded once."""
        return load_model(self.context.folders[self.needs[0]])


class Midtrain(_Likelihood):
    """The mid-trained model: likelihood of the candidates' semantic IDs after the history, without a prompt."""

    name = "midtrain"
    description = "the likelihood of the candidates' semantic IDs under the mid-trained model"
    needs = ("midtrain",)
    settings_prefixes = ("llm_bf16",)

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending log-likelihood."""
        model, tokenizer = self.model
        longest = self.settings["mid_max_length"]
        histories = [history_ids(r.history, self.catalog, tokenizer, longest) for r in requests]
        items = [request.items for request in requests]
        scores = sid_log_likelihood(model, tokenizer, self.settings, self.catalog, histories, items)
        return [by_score(request, row) for request, row in zip(requests, scores, strict=True)]


class OneRecThink(_Likelihood):
    """OneRec-Think: likelihood of the candidates' semantic IDs after sampled traces."""

    name = "onerec_think"
    description = "OneRec-Think (re-implemented), by the likelihood of the candidates after a trace"
    needs = ("onerec_think",)

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending log-likelihood."""
        scores = candidate_scores(self.context, self.name, *self.model, requests)
        return [by_score(request, row) for request, row in zip(requests, scores, strict=True)]


class OneRecThinkWithoutTraces(OneRecThink):
    """OneRec-Think that was trained without traces."""

    name = "onerec_think-no-think"
    description = "OneRec-Think (re-implemented) without traces"
    needs = ("onerec_think-no-think",)
