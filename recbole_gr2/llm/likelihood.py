"""Ranking candidates by the likelihood of their semantic IDs (how OneRec-Think is used as a re-ranker)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recbole_gr2.console import progress
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.rollout import attention_bias, check_window, left_pad, positions


@torch.no_grad()
def continuation_log_likelihood(
    model,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int = 16,
    bf16: bool = False,
    trie: SidTrie | None = None,
) -> list[list[float]]:
    """Log-likelihood of each prompt's continuations: B prompts with K continuations each -> B lists of K numbers.

    Each prompt is read once, with its continuations side by side behind it, each seeing the prompt and itself alone.

    Args:
        prompts: token ids, none empty.
        continuations: token ids, all of one length S within the call, K of them for every prompt of a batch.
        trie: the continuations are the codes of semantic IDs, and each is as likely as it is among those that the trie
            admits; None: among all tokens.

    Raises:
        ConfigurationError: a prompt and a continuation do not fit the model's sliding window.
    """
    model.eval()
    check_window(model, max((len(p) + len(c[0]) for p, c in zip(prompts, continuations, strict=True)), default=0))
    by_shape = sorted(range(len(prompts)), key=lambda i: (len(continuations[i]), -len(prompts[i]), i))
    result: list[list[float]] = [[] for _ in prompts]
    for start in progress(range(0, len(by_shape), batch_size), "likelihood"):
        chunk = by_shape[start : start + batch_size]
        count = len(continuations[chunk[0]])
        chunks = [chunk] if all(len(continuations[i]) == count for i in chunk) else [[i] for i in chunk]
        for part in chunks:
            scores = _batch(model, [prompts[i] for i in part], [continuations[i] for i in part], pad_id, bf16, trie)
            for i, row in zip(part, scores, strict=True):
                result[i] = row
    return result


@torch.no_grad()
def perplexity(
    model, texts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16, bf16: bool = False
) -> float:
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
    device, count, size = model.device, len(continuations[0]), len(continuations[0][0])
    ids, mask = left_pad(prompts, pad_id, device)
    following = torch.tensor(continuations, device=device)  # (B, K, S)
    length, behind = ids.size(1), count * size
    sees = mask.new_zeros(len(ids), length + behind, length + behind, dtype=torch.bool)
    sees[:, :, :length] = mask.bool().unsqueeze(1)
    sees[:, :length, :length] &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees[:, length:, length:] = torch.block_diag(*[torch.ones(size, size, device=device).tril()] * count).bool()
    places = mask.sum(1, keepdim=True) + torch.arange(size, device=device).repeat(count)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(
            input_ids=torch.cat([ids, following.flatten(1)], dim=1),
            attention_mask=attention_bias(sees, model),
            position_ids=torch.cat([positions(mask), places], dim=1),
            use_cache=False,
            logits_to_keep=behind + 1,
        ).logits.float()
    first, rest = logits[:, :1].unsqueeze(1).expand(-1, count, -1, -1), logits[:, 1:].unflatten(1, (count, size))
    logits = torch.cat([first, rest[:, :, :-1]], dim=2).flatten(0, 1)  # (B * K, S, V), in front of each token
    following = following.flatten(0, 1)
    if trie is None:
        chosen = logits.log_softmax(-1).gather(-1, following.unsqueeze(-1)).squeeze(-1)
    else:
        chosen = trie.to(device).log_probs(logits, following)
    return chosen.sum(-1).view(len(prompts), count).tolist()
