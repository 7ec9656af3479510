"""Ranking candidates by the likelihood of their semantic IDs (how OneRec-Think is used as a re-ranker)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.rollout import left_pad, positions


@torch.no_grad()
def continuation_log_likelihood(
    model, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], *, pad_id: int,
    batch_size: int = 16, bf16: bool = False, trie: SidTrie | None = None,
) -> list[list[float]]:  # fmt: skip
    """Log-likelihood of each prompt's continuations: B prompts with K continuations each -> B lists of K numbers.

    Each prompt is read once and its key-value cache repeated for its continuations.

    Args:
        prompts: token ids, none empty.
        continuations: token ids, all of one length S within the call, K of them for every prompt of a batch.
        trie: the continuations are the codes of semantic IDs, and each is as likely as it is among those that the trie
            admits; None: among all tokens.
    """
    model.eval()
    by_shape = sorted(range(len(prompts)), key=lambda i: (len(continuations[i]), -len(prompts[i]), i))
    result: list[list[float]] = [[] for _ in prompts]
    for start in range(0, len(by_shape), batch_size):
        chunk = by_shape[start : start + batch_size]
        count = len(continuations[chunk[0]])
        chunks = [chunk] if all(len(continuations[i]) == count for i in chunk) else [[i] for i in chunk]
        for part in chunks:
            scores = _batch(model, [prompts[i] for i in part], [continuations[i] for i in part], pad_id, bf16, trie)
            for i, row in zip(part, scores, strict=True):
                result[i] = row
    return result


@torch.no_grad()
def perplexity(model, texts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16, bf16: bool = False
               ) -> float:  # fmt: skip
    """exp of the mean negative log-likelihood of a token, over texts given as token ids; their first ones are given."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        tokens, mask = left_pad(texts[start : start + batch_size], pad_id, model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        scored = mask[:, :-1].bool() & mask[:, 1:].bool()
        chosen = logits[:, :-1][scored].float().log_softmax(-1).gather(-1, tokens[:, 1:][scored].unsqueeze(-1))
        total, count = total - chosen.sum().item(), count + len(chosen)
    return math.exp(total / count)


def _batch(model, prompts, continuations, pad_id: int, bf16: bool, trie: SidTrie | None) -> list[list[float]]:
    device, count = model.device, len(continuations[0])
    tokens, mask = left_pad(prompts, pad_id, device)
    following = torch.tensor(continuations, device=device).flatten(0, 1)  # (B * K, S)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        read = model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=True,
                     logits_to_keep=1)  # fmt: skip
        cache = read.past_key_values
        cache.batch_repeat_interleave(count)
        whole = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(following)], dim=1)
        step = model(input_ids=following, attention_mask=whole, past_key_values=cache, use_cache=True,
                     position_ids=positions(whole)[:, -following.size(1) :])  # fmt: skip
    first = read.logits[:, -1:].repeat_interleave(count, 0)
    logits = torch.cat([first, step.logits[:, :-1]], dim=1).float()
    if trie is None:
        chosen = logits.log_softmax(-1).gather(-1, following.unsqueeze(-1)).squeeze(-1)
    else:
        chosen = trie.to(device).log_probs(logits, following)
    return chosen.sum(-1).view(len(prompts), count).tolist()
