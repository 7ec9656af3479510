"""Generate semantic IDs (SIDs) of the catalog: a prefix trie, beam search with it, and scores of items.

An item is written as `<|sid_begin|>`, L code tokens, `<|sid_end|>`. OneRec-Think (arXiv 2510.11639) decodes it with 10
beams. The trie admits exactly the SIDs of the catalog. The search does not call `model.generate`, so that no field of a
model's generation config (sampling, penalties, length) changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from recbole_gr2.batching import by_length
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.inputs import attention_bias, check_window, evaluating, left_pad, positions
from recbole_gr2.progress import progress
from recbole_gr2.sid.tokens import SID_BEGIN, code_tokens

# Score of an item that no beam reaches. It is finite, because masked items have -inf, and exact in float32.
UNREACHED = -(2.0**100)


@dataclass(frozen=True)
class SidTrie:
    """The prefixes of the SIDs of N items. Depth 0 is the root, depth L contains one leaf per distinct SID.

    Nodes of a depth are numbered from 0 in lexicographic order of their codes, so that the children of a node are a
    range. A million random items with 4 levels of 256 codes need 49 MB. A dense table of children (nodes, C) would need
    1.06 GB in int32, and below the second level its rows would be nearly empty.

    Attributes:
        begin_id: Token id of `<|sid_begin|>`.
        tokens: `tokens[d]` (nodes of depth d + 1,): the token id that leads to a node.
        starts: `starts[d]` (nodes of depth d, + 1): node n has the children starts[d][n] .. starts[d][n + 1] - 1. The
            children of a leaf (d = L) are positions in `items`.
        widths: `widths[d]`: the largest number of children of a node of depth d.
        items: Item ids, (N,), leaf by leaf, in ascending order within a leaf. Several items of a leaf collide.
        leaf_of: Leaf of each item id 1..N, (N,).
    """

    begin_id: int
    tokens: tuple[torch.Tensor, ...]
    starts: tuple[torch.Tensor, ...]
    widths: tuple[int, ...]
    items: torch.Tensor
    leaf_of: torch.Tensor

    @classmethod
    def build(cls, codes: np.ndarray, token_ids: np.ndarray, *, begin_id: int) -> SidTrie:
        """Return the trie of a catalog.

        Args:
            codes: Codes of the items, (N, L). Row i belongs to item id i + 1.
            token_ids: Token id of each (level, code), (L, C).
            begin_id: Token id of `<|sid_begin|>`.

        Raises:
            ConfigurationError: There are no items, a code has no token, or two codes have the same token.

        >>> trie = SidTrie.build([(0, 2), (1, 0), (0, 2)], [(10, 11, 12), (20, 21, 22)], begin_id=9)
        >>> trie.items.tolist(), trie.leaf_of.tolist()
        ([1, 3, 2], [0, 1, 0])
        """
        codes, token_ids = np.asarray(codes), np.asarray(token_ids)
        if (
            codes.ndim != 2
            or not codes.size
            or len(token_ids) != codes.shape[1]
            or not 0 <= codes.min() <= codes.max() < token_ids.shape[1]
            or len(np.unique(token_ids)) < token_ids.size
        ):
            raise ConfigurationError(
                f"codes {codes.shape} cannot be written with tokens {token_ids.shape}",
                where="SidTrie.build",
                why="each code of each level needs its own token",
                do="give the codes of all items as (N, L) and token ids as (L, C) with every code below C",
            )
        order = np.lexsort(codes.T[::-1])
        ordered = codes[order]
        differs = np.r_[np.ones((1, codes.shape[1]), bool), ordered[1:] != ordered[:-1]]
        opens = np.logical_or.accumulate(differs, axis=1)  # (N, L): the first item with this prefix of l + 1 codes
        firsts = [np.zeros(1, int), *(np.flatnonzero(level) for level in opens.T), np.arange(len(codes))]
        starts = [np.r_[np.searchsorted(below, above), len(below)] for above, below in pairwise(firsts)]
        tokens = [token_ids[level][ordered[first, level]] for level, first in enumerate(firsts[1:-1])]
        leaf_of = np.empty(len(codes), int)
        leaf_of[order] = opens[:, -1].cumsum() - 1
        return cls(
            begin_id=begin_id,
            tokens=tuple(torch.from_numpy(part) for part in tokens),
            starts=tuple(torch.from_numpy(part) for part in starts),
            widths=tuple(int(np.diff(part).max()) for part in starts),
            items=torch.from_numpy(order + 1),
            leaf_of=torch.from_numpy(leaf_of),
        )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, codes: np.ndarray) -> SidTrie:
        """Return the trie of codes (N, L) with the tokens of `sid.tokens`. Row i belongs to item id i + 1.

        Raises:
            ConfigurationError: The tokenizer has no token for a code.
        """
        codes = np.asarray(codes)
        levels, count = codes.shape[1], int(codes.max()) + 1
        vocabulary, names = tokenizer.get_vocab(), code_tokens(levels, count)
        absent = [name for name in (SID_BEGIN, *names) if name not in vocabulary]
        if absent:
            raise ConfigurationError(
                f"the tokenizer has no token for {len(absent)} parts of semantic IDs, e.g. {absent[0]}",
                where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
                why="an item is generated code by code, one token per code",
                do="add the tokens of sid.tokens.added_tokens before the trie is built",
            )
        ids = np.array([vocabulary[name] for name in names]).reshape(levels, count)
        return cls.build(codes, ids, begin_id=vocabulary[SID_BEGIN])

    @property
    def levels(self) -> int:
        """The number of levels, L."""
        return len(self.tokens)

    def nodes(self, depth: int) -> int:
        """Return the number of nodes of a depth 0..L. `nodes(L)` is the number of distinct SIDs."""
        return len(self.starts[depth]) - 1

    def to(self, device: torch.device) -> SidTrie:
        """Return a copy of the trie whose tensors are on `device`."""
        tokens, starts = (tuple(part.to(device) for part in parts) for parts in (self.tokens, self.starts))
        return replace(self, tokens=tokens, starts=starts, items=self.items.to(device), leaf_of=self.leaf_of.to(device))

    def children(self, depth: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the children (..., widths[depth]) of nodes (...) of a depth, and whether each is real.

        A child that is not real repeats the first one.
        """
        first, end = (self.starts[depth][part].unsqueeze(-1) for part in (nodes, nodes + 1))
        children = first + torch.arange(self.widths[depth], device=nodes.device)
        real = children < end
        return torch.where(real, children, first), real

    @cached_property
    def forks(self) -> tuple[torch.Tensor, ...]:
        """Whether each node leads to several leaves: `forks[d]` (nodes of depth d,), d < L."""
        first = torch.arange(self.nodes(self.levels) + 1, device=self.items.device)  # first leaf of each node, and end
        firsts = [first := first[starts] for starts in self.starts[-2::-1]]
        return tuple(first.diff() > 1 for first in reversed(firsts))

    def used_up(self, excluded: torch.Tensor) -> list[torch.Tensor]:
        """Return whether a node leads to excluded items only: for the depths 1..L, (B, nodes of the depth).

        Args:
            excluded: Whether each item is excluded, (B, N). Column i belongs to item id i + 1.

        >>> trie = SidTrie.build([(0, 2), (1, 0), (1, 1)], [(10, 11, 12), (20, 21, 22)], begin_id=9)
        >>> [nodes.tolist() for nodes in trie.used_up(torch.tensor([[False, True, True]]))]
        [[[False, True]], [[False, True, True]]]
        """
        nodes, found = excluded[:, self.items - 1], []
        for starts in reversed(self.starts[1:]):
            before = torch.nn.functional.pad(nodes.cumsum(1), (1, 0))
            nodes = before[:, starts[1:]] - before[:, starts[:-1]] == starts.diff()
            found.append(nodes)
        return found[::-1]

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-probability (R, L) of each code of R SIDs of the catalog among the codes that the trie admits.

        Args:
            logits: (R, L, V), which predict the codes.
            tokens: Token ids of the codes, (R, L).

        >>> trie = SidTrie.build([(0, 2), (1, 0), (1, 1)], [(0, 1, 2), (3, 4, 5)], begin_id=9)
        >>> trie.log_probs(torch.zeros(1, 2, 6), torch.tensor([[1, 3]])).exp()
        tensor([[0.5000, 0.5000]])
        """
        nodes, log_probs = tokens.new_zeros(len(tokens)), []
        for depth in range(self.levels):
            children, real = self.children(depth, nodes)
            codes = self.tokens[depth][children]
            chosen = real & (codes == tokens[:, depth : depth + 1])
            admitted = logits[:, depth].float().gather(1, codes).masked_fill(~real, -torch.inf)
            log_probs.append(admitted.log_softmax(1)[chosen])
            nodes = children[chosen]  # one per row, because a code has one token
        return torch.stack(log_probs, dim=1)

    def begins(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the positions (R,) in token ids (T,) at which the L codes of an item begin."""
        first = torch.arange(max(len(tokens) - self.levels + 1, 0), device=tokens.device)
        first = first[torch.isin(tokens[: len(first)], self.tokens[0])]
        nodes = torch.zeros_like(first)
        for depth in range(self.levels):
            children, real = self.children(depth, nodes)
            chosen = real & (self.tokens[depth][children] == tokens[first + depth].unsqueeze(1))
            first, nodes = first[chosen.any(1)], children[chosen]
        return first


class Beams(NamedTuple):
    """The results of a beam search for B prompts, best first: W = min(beams, distinct SIDs) per prompt.

    Attributes:
        leaves: Leaves of the trie, (B, W) long. The leaves of a prompt with finite log-probabilities are distinct.
        log_probs: Their log-probabilities in nats, (B, W), descending. -inf for a leaf whose items are excluded: a
            prompt has such leaves if fewer than W others exist.
    """

    leaves: torch.Tensor
    log_probs: torch.Tensor


@torch.no_grad()
def beam_items(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    trie: SidTrie,
    *,
    beams: int,
    batch_size: int,
    pad_id: int,
    constrained: bool = True,
    bf16: bool = False,
    excluded: torch.Tensor | None = None,
) -> Beams:
    """Return the most likely SIDs of the catalog after each of B prompts, found by beam search, on the CPU.

    A log-probability is the sum over the L codes of their log-softmax among the codes that the trie admits, so that the
    probabilities of the catalog sum to 1. Without `constrained` the log-softmax is over the full vocabulary.
    `likelihood.continuation_log_likelihood` returns the same for the prompt with `<|sid_begin|>`, followed by the
    codes. `<|sid_begin|>` is read and not scored, because it is the same for all items. `<|sid_end|>` is neither read
    nor scored: after L codes no other token is possible.

    If `beams` is at least the number of distinct SIDs, the search is exhaustive. Up to rounding errors, a result does
    not depend on the other prompts of the batch.

    With `excluded` no beam continues to a SID whose items are all excluded. So each prompt has `beams` other SIDs, or
    all of them. The log-probabilities are the same as without it, as the softmax includes excluded items.

    Args:
        model: A causal language model.
        prompt_ids: Token ids of each prompt without `<|sid_begin|>`, none empty.
        trie: The trie of the catalog.
        beams: Width of the search, at least 1.
        batch_size: Prompts that are read together. Each is read once.
        pad_id: Id of the padding token.
        constrained: Normalize over the codes that the trie admits, as in training with `mid_constrained`.
        bf16: Run the model under bfloat16 autocast.
        excluded: Whether each item is excluded, (B, N). Column i belongs to item id i + 1.

    Raises:
        ConfigurationError: A prompt is empty or does not fit the sliding window of the model, or `beams` or
            `batch_size` is below 1.
    """
    if min(beams, batch_size) < 1 or not all(prompt_ids):
        raise ConfigurationError(
            f"no search with {beams} beams, {batch_size} prompts per batch, and "
            f"{sum(not ids for ids in prompt_ids)} empty prompts",
            where="beam_items",
            why="the search needs at least one beam and one prompt per batch, and a prompt at least one token",
            do="raise the number that is 0, or leave out users without a history",
        )
    check_window(model, max(map(len, prompt_ids), default=0) + 1 + trie.levels)
    width = min(beams, trie.nodes(trie.levels))
    result = Beams(torch.empty(len(prompt_ids), width, dtype=torch.long), torch.empty(len(prompt_ids), width))
    trie = trie.to(model.device)
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for batch in progress(by_length([len(ids) for ids in prompt_ids], batch_size), "beam search, batch"):
            used_up = [] if excluded is None else trie.used_up(excluded[batch].to(model.device))
            prompts = [prompt_ids[i] for i in batch]
            leaves, log_probs = _search(model, prompts, trie, beams, pad_id, constrained, used_up)
            result.leaves[batch], result.log_probs[batch] = leaves.cpu(), log_probs.cpu()
    return result


def item_scores(beams: Beams, trie: SidTrie) -> torch.Tensor:
    """Return scores (B, N + 1) of the full catalog, float64: the score of an item is the log-probability of its SID.

    Items that no beam reaches have the score `UNREACHED`. Padding (column 0) has -inf. If a row contains a leaf twice
    (beams of several traces), the best beam counts. Items with the same SID tie, and so do all unreached items.
    RecBole's evaluator calls `torch.topk`, which breaks ties by position, so that a target could be hit by chance. Pass
    it the result of `target_last`.
    """
    by_leaf = torch.full((len(beams.leaves), trie.nodes(trie.levels)), UNREACHED, dtype=torch.float64)
    by_leaf.scatter_reduce_(1, beams.leaves, beams.log_probs.double(), "amax")
    return torch.nn.functional.pad(by_leaf[:, trie.leaf_of], (1, 0), value=-torch.inf)


def target_last(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return scores (B, N + 1) in which each target is just below the items with the same score.

    An SID of m items then occupies m ranks, and the target has the last of them. A generated SID does not distinguish
    the target from the other items, and GR2 does not count it as a hit. The metrics of a row can only decrease. No
    other score changes.

    The score of the target decreases by the smallest step of the dtype. So in float64 rows of float32 numbers, such as
    those of `item_scores`, the target stays above all items with lower scores.

    Args:
        scores: (B, N + 1).
        targets: Item id of each target, (B,).

    >>> target_last(torch.tensor([[-torch.inf, -1.0, -1.0, -2.0]]), torch.tensor([1])).argsort(descending=True)
    tensor([[2, 1, 3, 0]])
    """
    column = targets.unsqueeze(1)
    of_target = scores.gather(1, column)
    return scores.scatter(1, column, of_target.nextafter(torch.full_like(of_target, -torch.inf)))


def search(
    logits: torch.Tensor,
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    trie: SidTrie,
    beams: int,
    *,
    constrained: bool,
    used_up: Sequence[torch.Tensor] = (),
) -> Beams:
    """Return the result of a beam search for B prompts with any model, on the device of `logits`.

    Each depth has min(beams, nodes of the depth) beams per prompt. There are always enough: either all nodes of the
    depth are beams, and all nodes of the next depth are their children, or `beams` nodes are, each with at least one
    child.

    Args:
        logits: (B, V), which predict the first code of each prompt.
        step: Reads one token per beam. It gets the rows (R,) of its previous call (at first: of the prompts) that the
            beams continue, prompt by prompt, and the token (R, 1) of each. It returns the logits (R, V) of the next
            code.
        trie: The trie of the catalog.
        beams: Width of the search.
        constrained: Normalize the probability of a code over the codes that the trie admits, not over all V tokens.
            Then the rest of an SID is certain if only one SID has this prefix, and `step` does not read it. Otherwise R
            is W per prompt.
        used_up: Nodes that no beam reaches, as `SidTrie.used_up` returns them; () for none. A prompt that has fewer
            than W other nodes gets some of them with the score -inf.
    """
    prompt = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    nodes = torch.zeros_like(prompt)  # (B, W), at first only the root
    scores = torch.zeros(len(logits), 1, device=logits.device)
    read = torch.ones_like(nodes, dtype=torch.bool)  # whether `logits` has a row for each beam, in this order
    for depth in range(trie.levels):
        children, real = trie.children(depth, nodes)  # (B, W, D)
        logits = logits.float()
        admitted = logits.gather(-1, trie.tokens[depth][children[read]]).masked_fill(~real[read], -torch.inf)
        steps = torch.zeros(real.shape, device=logits.device).masked_fill(~real, -torch.inf)
        steps[read] = admitted - (admitted if constrained else logits).logsumexp(-1, keepdim=True)
        if used_up:
            steps.masked_fill_(used_up[depth].gather(1, children.flatten(1)).view_as(steps), -torch.inf)
        paths = (scores.unsqueeze(-1) + steps).flatten(1)
        scores, chosen = paths.topk(min(beams, trie.nodes(depth + 1)))
        parents = prompt * nodes.size(1) + chosen // trie.widths[depth]
        nodes = children.flatten(1).gather(1, chosen)
        if depth + 1 < trie.levels:
            rows = (read.flatten().cumsum(0) - 1)[parents]
            read = trie.forks[depth + 1][nodes] if constrained else torch.ones_like(nodes, dtype=torch.bool)
            logits = step(rows[read], trie.tokens[depth][nodes[read]].unsqueeze(1)) if read.any() else logits[:0]
    return Beams(nodes, scores)


def _search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    trie: SidTrie,
    beams: int,
    pad_id: int,
    constrained: bool,
    used_up: Sequence[torch.Tensor],
) -> Beams:
    """Run `search` for one batch with a decoder-only language model.

    All beams of a prompt are read in one sequence after it, and each attends to the prompt and to its own codes. So the
    cache stores a prompt once, and a beam that continues does not copy it.
    """
    ids, mask = left_pad([[*prompt, trie.begin_id] for prompt in prompts], pad_id, model.device)
    cache = DynamicCache()
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    place = mask.sum(dim=1, keepdim=True)  # position of the next token, (B, 1)
    # The prompt of each beam, and the entries of the cache to which it attends.
    prompt, visible = torch.arange(len(ids), device=ids.device), mask.bool()

    def step(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal place, prompt, visible
        prompt, visible = prompt[rows], visible[rows]
        column = torch.arange(len(rows), device=rows.device) - torch.searchsorted(prompt, prompt)
        width, before = int(column.max()) + 1, visible.size(1)
        ids = tokens.new_full((len(place), width), pad_id)
        ids[prompt, column] = tokens.squeeze(1)
        attends = torch.eye(before + width, dtype=torch.bool, device=rows.device)[before:].repeat(len(place), 1, 1)
        attends[prompt, column, :before] = visible
        logits = model(
            input_ids=ids,
            attention_mask=attention_bias(attends, model),
            use_cache=True,
            position_ids=place.expand(-1, width),
            past_key_values=cache,
        ).logits
        place, visible = place + 1, attends[prompt, column]
        return logits[prompt, column]

    return search(logits, step, trie, beams, constrained=constrained, used_up=used_up)
