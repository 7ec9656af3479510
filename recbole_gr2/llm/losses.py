"""Log-probabilities of completions with gradient, as the loss of RL needs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from recbole_gr2.llm.grammar import Grammar, constrained_log_probs
from recbole_gr2.llm.inputs import positions


def completion_log_probs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    label_prior: torch.Tensor,
    grammar: Grammar,
    temperature: float,
    *,
    share_prompts: bool = True,
    micro_batch_size: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies (B, O) of completions under the grammar.

    Args:
        model: A causal language model.
        input_ids: Prompts, padded on the left, and completions, padded on the right, (B, P + O).
        attention_mask: (B, P + O).
        completion_length: O.
        label_prior: Log-priors of the labels, (B, labels).
        grammar: The grammar of completions.
        temperature: Divisor of the logits.
        share_prompts: Read equal prompts once, see `completion_logits`.
        micro_batch_size: Completions that pass through the model at once. None: all.
        autocast: Returns the context of the forward pass.
    """
    size = micro_batch_size or len(input_ids)
    parts = zip(input_ids.split(size), attention_mask.split(size), label_prior.split(size), strict=True)
    log_probs, entropies = [], []
    for ids, mask, prior in parts:
        with autocast():
            logits = completion_logits(model, ids, mask, completion_length, share_prompts)
        log_prob, entropy = constrained_log_probs(
            logits,
            ids[:, -completion_length:],
            prior,
            grammar,
            temperature,
            grammar.cited(ids[:, :-completion_length], prior),
        )
        log_probs.append(log_prob)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def vocabulary_log_probs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    *,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> torch.Tensor:
    """Return log-probabilities (B, O) of completions over the whole vocabulary, at temperature 1.

    Args:
        model: A causal language model.
        input_ids: Prompts, padded on the left, and completions, padded on the right, (B, P + O).
        attention_mask: (B, P + O).
        completion_length: O.
        micro_batch_size: Completions that pass through the model at once.
        autocast: Returns the context of the forward pass.
    """
    log_probs = []
    for ids, mask in zip(input_ids.split(micro_batch_size), attention_mask.split(micro_batch_size), strict=True):
        with autocast():
            logits = completion_logits(model, ids, mask, completion_length, share_prompts=False)
        chosen = ids[:, -completion_length:].unsqueeze(-1)
        log_probs.append(logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1))
    return torch.cat(log_probs)


def completion_logits(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    share_prompts: bool,
) -> torch.Tensor:
    """Return the logits (B, O, V) that predict the last O tokens of `input_ids` (B, P + O).

    With `share_prompts`, equal prompts are read once, and all their completions use the same keys and values, with
    gradient. A group of G then needs P + G * O tokens instead of G * (P + O).
    """
    place = positions(attention_mask)
    if not share_prompts:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=place,
            use_cache=False,
            logits_to_keep=completion_length + 1,
        ).logits[:, :-1]
    prompt_length = input_ids.size(1) - completion_length
    prompts = torch.cat([input_ids[:, :prompt_length], attention_mask[:, :prompt_length]], dim=1)
    unique, prompt_of = prompts.unique(dim=0, return_inverse=True)
    prompt_ids, prompt_mask = unique.chunk(2, dim=1)
    head = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    head.past_key_values.batch_select_indices(prompt_of)
    tail = model(
        input_ids=input_ids[:, prompt_length:-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=place[:, prompt_length:-1],
        past_key_values=head.past_key_values,
        use_cache=True,
    )
    return torch.cat([head.logits[prompt_of], tail.logits], dim=1)
