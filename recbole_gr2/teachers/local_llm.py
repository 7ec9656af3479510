"""A language model on this machine as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from recbole_gr2.catalog import Catalog
from recbole_gr2.prompts import PromptMaker, encode_prompt
from recbole_gr2.ranking import promote
from recbole_gr2.seeding import derive_seed
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.types import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recbole_gr2.llm.grammar import Grammar

HINT = "The shopper took {label}. Say why, in one sentence."


class LocalLLM(Protocol):
    """A loaded language model that acts as a teacher, e.g. `recbole_gr2.policy.Policy`."""

    @property
    def model(self) -> PreTrainedModel:
        """The language model."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the tokens of semantic IDs and labels."""
        ...

    @property
    def grammar(self) -> Grammar:
        """The form of an answer: free text, then a ranking."""
        ...

    @property
    def bf16(self) -> bool:
        """Whether the model generates in bfloat16."""
        ...

    @property
    def engine(self) -> str:
        """What runs the model, see `recbole_gr2.llm.generation.ENGINES`."""
        ...


class LocalLLMTeacher:
    """Generates free text and a ranking under the answer grammar.

    Under targeted sampling the prompt names the target, and the ranking is the order of the prior with the target in
    first place. Attempt 0 of rejection sampling is greedy; every other generation samples with trace_temperature.

    Args:
        catalog: the items, with their semantic IDs.
        settings: settings of the run. The teacher reads trace_temperature and the prompt settings.
        seed: seed of the sampling.
        language_model: the model, its tokenizer and the answer grammar.
    """

    name = "local_llm"

    def __init__(self, *, catalog: Catalog, settings: Mapping[str, Any], seed: int, language_model: LocalLLM) -> None:
        self.maker = PromptMaker.of(settings, catalog)
        self.temperature, self.seed, self.language_model = settings["trace_temperature"], seed, language_model

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
        """Reply to each request, see `Teacher.argue`."""
        from recbole_gr2.llm.answers import read_answer
        from recbole_gr2.llm.generation import generate_rankings

        llm = self.language_model
        prompts = [self.maker.render(request) for request in requests]
        ids = []
        for request, prompt in zip(requests, prompts, strict=True):
            if targeted:
                label = prompt.labels[self.maker.label_items(request, prompt).index(request.target)]
                *before, user = prompt.messages
                hinted = {**user, "content": f"{user['content']}\n{HINT.format(label=label)}"}
                prompt = replace(prompt, messages=(*before, hinted))
            ids.append(encode_prompt(prompt, llm.tokenizer))
        completions = generate_rankings(
            llm.model,
            ids,
            [self.maker.label_prior(r, p) for r, p in zip(requests, prompts, strict=True)],
            grammar=llm.grammar,
            bf16=llm.bf16,
            engine=llm.engine,
            temperature=self.temperature if attempt or targeted else 0.0,
            seed=derive_seed(self.seed, attempt),
        )
        replies = []
        for request, prompt, completion in zip(requests, prompts, completions, strict=True):
            label_items = self.maker.label_items(request, prompt)
            answer = read_answer(request, completion, label_items, llm.grammar, llm.tokenizer)
            ranking = promote(request.by_prior, request.target) if targeted else answer.ranking
            replies.append(TeacherReply(reasoning=answer.reasoning, ranking=ranking))
        return replies
