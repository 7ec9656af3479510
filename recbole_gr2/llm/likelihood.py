"""Log-likelihoods of continuations, by which a language model ranks candidates, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recbole_gr2.batching import by_length
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.inputs import attention_bias, check_window, left_pad, positions
from recbole_gr2.progress import progress


@torch.no_grad()
def continuation_log_likelihood(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int = 16,
    bf16: bool = False,
    trie: SidTrie | None = None,
) -> list[list[float]]:
    """Return the log-likelihoods of K continuations of each of B prompts, as B lists of K numbers in nats.

    Each prompt is read once. All its continuations are read in one sequence after it, and each attends to the prompt
    and to itself. OneRec-Think re-ranks candidates in this way.

    Args:
        model: A causal language model.
        prompts: Token ids, none empty.
        continuations: Token ids, all of one length S. K may differ between prompts.
        pad_id: Id of the padding token.
        batch_size: Prompts that are read together.
        bf16: Run the model under bfloat16 autocast.
        trie: If given, the continuations are the codes of semantic IDs, and each code is normalized over the codes that
            the trie admits. None: over all tokens.

    Raises:
        ConfigurationError: A prompt with a continuation does not fit the sliding window of the model.
    """
    model.eval()
    check_window(model, max((len(p) + len(c[0]) for p, c in zip(prompts, continuations, strict=True)), default=0))
    batches = by_length([len(ids) for ids in prompts], batch_size, groups=[len(c) for c in continuations])
    result: list[list[float]] = [[] for _ in prompts]
    for batch in progress(batches, "likelihoods, batch"):
        equal = len({len(continuations[i]) for i in batch}) == 1
        for part in [batch] if equal else [[i] for i in batch]:
            scores = _log_likelihoods(
                model, [prompts[i] for i in part], [continuations[i] for i in part], pad_id, bf16, trie
            )
            for i, values in zip(part, scores, strict=True):
                result[i] = values
    return result


@torch.no_grad()
def perplexity(
    model: Any, texts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16, bf16: bool = False
) -> float:
    """Return exp of the mean negative log-likelihood per token over texts, given as token ids.

    The first token of each text is not scored. The result is infinite if it is too large for a float.
    """
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        tokens, mask = left_pad(texts[start : start + batch_size], pad_id, model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        scored = mask[:, :-1].bool() & mask[:, 1:].bool()
        chosen = logits[:, :-1][scored].float().log_softmax(-1).gather(-1, tokens[:, 1:][scored].unsqueeze(-1))
        total, count = total - chosen.sum().item(), count + len(chosen)
    return torch.tensor(total / count, dtype=torch.double).exp().item()


def _log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
    bf16: bool,
    trie: SidTrie | None,
) -> list[list[float]]:
    device, count, size = model.device, len(continuations[0]), len(continuations[0][0])
    ids, mask = left_pad(prompts, pad_id, device)
    following = torch.tensor(continuations, device=device)  # (B, K, S)
    length, total = ids.size(1), count * size
    visible = mask.new_zeros(len(ids), length + total, length + total, dtype=torch.bool)
    visible[:, :, :length] = mask.bool().unsqueeze(1)
    visible[:, :length, :length] &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    visible[:, length:, length:] = torch.block_diag(*[torch.ones(size, size, device=device).tril()] * count).bool()
    places = mask.sum(1, keepdim=True) + torch.arange(size, device=device).repeat(count)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(
            input_ids=torch.cat([ids, following.flatten(1)], dim=1),
            attention_mask=attention_bias(visible, model),
            position_ids=torch.cat([positions(mask), places], dim=1),
            use_cache=False,
            logits_to_keep=total + 1,
        ).logits.float()
    first, rest = logits[:, :1].unsqueeze(1).expand(-1, count, -1, -1), logits[:, 1:].unflatten(1, (count, size))
    logits = torch.cat([first, rest[:, :, :-1]], dim=2).flatten(0, 1)  # (B * K, S, V), which predict the tokens
    following = following.flatten(0, 1)
    if trie is None:
        chosen = logits.log_softmax(-1).gather(-1, following.unsqueeze(-1)).squeeze(-1)
    else:
        chosen = trie.to(device).log_probs(logits, following)
    return chosen.sum(-1).view(len(prompts), count).tolist()
