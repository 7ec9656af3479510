"""Generating semantic IDs of the whole catalogue: a prefix trie, beam search under it, and scores of items.

An item is written `<|sid_begin|>`, L code tokens, `<|sid_end|>`; OneRec-Think (arXiv 2510.11639) decodes it with a beam
of width 10. Here the trie admits the catalogue's SIDs and nothing else, and `model.generate` is not called, so that no
field of a model's own generation config (sampling, penalties, length) reaches a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from recbole_gr2.console import progress
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.rollout import attention_bias, check_window, evaluating, left_pad, positions
from recbole_gr2.sid.tokens import SID_BEGIN, code_tokens

# Score of an item that no beam names: finite, because -inf is what a row's masked items have, and the same in float32.
UNREACHED = -(2.0**100)


@dataclass(frozen=True)
class SidTrie:
    """The prefixes of N items' SIDs: depth 0 is the root, depth L the leaves, one leaf per distinct SID.

    Nodes of a depth are numbered from 0 in lexicographic order of their codes, so the children of a node are a range:

    `tokens[d]` (nodes of depth d + 1,): token id that leads to a node;
    `starts[d]` (nodes of depth d, + 1): node n has the children starts[d][n] .. starts[d][n + 1] - 1; those of a leaf
    (d = L) are places in `items`;
    `widths[d]`: most children of any node of depth d;
    `items` (N,): item ids, leaf by leaf, ascending within a leaf; more than one is a collision;
    `leaf_of` (N,): leaf of item id 1..N.

    Two numbers a node: a million random items of 4 levels x 256 codes take 49 MB. A dense table of children (nodes, C)
    would take 1.06 GB in int32, and its rows of 256 are nearly empty below the second level.
    """

    begin_id: int
    tokens: tuple[torch.Tensor, ...]
    starts: tuple[torch.Tensor, ...]
    widths: tuple[int, ...]
    items: torch.Tensor
    leaf_of: torch.Tensor

    @classmethod
    def build(cls, codes: np.ndarray, token_ids: np.ndarray, *, begin_id: int) -> SidTrie:
        """The trie of codes (N, L), row i being item id i + 1, with the token ids (L, C) of every (level, code).

        Raises:
            ConfigurationError: no items, a code that has no token, or two codes with the same token.

        >>> trie = SidTrie.build([(0, 2), (1, 0), (0, 2)], [(10, 11, 12), (20, 21, 22)], begin_id=9)
        >>> [trie.items_of(leaf).tolist() for leaf in range(trie.nodes(2))]
        [[1, 3], [2]]
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
                why="every code of every level needs a token of its own",
                do="give the codes of all items as (N, L) and token ids as (L, C) with every code below C",
            )
        order = np.lexsort(codes.T[::-1])
        ordered = codes[order]
        differs = np.r_[np.ones((1, codes.shape[1]), bool), ordered[1:] != ordered[:-1]]
        opens = np.logical_or.accumulate(differs, axis=1)  # (N, L): this item is the first of its prefix of l + 1 codes
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
        """The trie of codes (N, L), row i being item id i + 1, in the tokens of `sid.tokens`.

        Raises:
            ConfigurationError: the tokenizer has no token for one of them.
        """
        codes = np.asarray(codes)
        levels, count = codes.shape[1], int(codes.max()) + 1
        vocabulary, names = tokenizer.get_vocab(), code_tokens(levels, count)
        absent = [name for name in (SID_BEGIN, *names) if name not in vocabulary]
        if absent:
            raise ConfigurationError(
                f"the tokenizer has no token for {len(absent)} parts of semantic IDs, {absent[0]} among them",
                where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
                why="an item is generated code by code, one token each",
                do="add the tokens of sid.tokens.added_tokens before building the trie",
            )
        ids = np.array([vocabulary[name] for name in names]).reshape(levels, count)
        return cls.build(codes, ids, begin_id=vocabulary[SID_BEGIN])

    @property
    def levels(self) -> int:
        """L."""
        return len(self.tokens)

    def nodes(self, depth: int) -> int:
        """How many nodes there are at a depth 0..L; `nodes(L)` distinct SIDs."""
        return len(self.starts[depth]) - 1

    def to(self, device: torch.device) -> SidTrie:
        """The same trie with its tensors on `device`."""
        tokens, starts = (tuple(part.to(device) for part in parts) for parts in (self.tokens, self.starts))
        return replace(self, tokens=tokens, starts=starts, items=self.items.to(device), leaf_of=self.leaf_of.to(device))

    def children(self, depth: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Children (..., widths[depth]) of nodes (...) of a depth, and which are real: the others repeat the first."""
        first, end = (self.starts[depth][part].unsqueeze(-1) for part in (nodes, nodes + 1))
        children = first + torch.arange(self.widths[depth], device=nodes.device)
        real = children < end
        return torch.where(real, children, first), real

    @cached_property
    def forks(self) -> tuple[torch.Tensor, ...]:
        """`forks[d]` (nodes of depth d,), d < L: whether a node leads to several leaves."""
        first = torch.arange(self.nodes(self.levels) + 1, device=self.items.device)  # first leaf of every node, and end
        firsts = [first := first[starts] for starts in self.starts[-2::-1]]
        return tuple(first.diff() > 1 for first in reversed(firsts))

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability (R, L) of each code of R SIDs of the catalogue among the codes that may stand there.

        Args:
            logits: (R, L, V), in front of each code.
            tokens: (R, L), the codes' token ids.

        >>> trie = SidTrie.build([(0, 2), (1, 0), (1, 1)], [(0, 1, 2), (3, 4, 5)], begin_id=9)
        >>> trie.log_probs(torch.zeros(1, 2, 6), torch.tensor([[1, 3]])).exp()
        tensor([[0.5000, 0.5000]])
        """
        nodes, found = tokens.new_zeros(len(tokens)), []
        for depth in range(self.levels):
            children, real = self.children(depth, nodes)
            codes = self.tokens[depth][children]
            chosen = real & (codes == tokens[:, depth : depth + 1])
            admitted = logits[:, depth].float().gather(1, codes).masked_fill(~real, -torch.inf)
            found.append(admitted.log_softmax(1)[chosen])
            nodes = children[chosen]  # one a row: a code has one token
        return torch.stack(found, dim=1)

    def begins(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions (R,) in token ids (T,) where the L codes of an item begin."""
        first = torch.arange(max(len(tokens) - self.levels + 1, 0), device=tokens.device)
        first = first[torch.isin(tokens[: len(first)], self.tokens[0])]
        nodes = torch.zeros_like(first)
        for depth in range(self.levels):
            children, real = self.children(depth, nodes)
            chosen = real & (self.tokens[depth][children] == tokens[first + depth].unsqueeze(1))
            first, nodes = first[chosen.any(1)], children[chosen]
        return first

    def items_of(self, leaf: int) -> torch.Tensor:
        """Ids of the items that share a leaf's SID, ascending."""
        return self.items[self.starts[-1][leaf] : self.starts[-1][leaf + 1]]


class Beams(NamedTuple):
    """What a beam search found for B prompts, best first: W = min(beams, distinct SIDs) for every prompt.

    `leaves` (B, W) long: leaves of the trie, no two of a row alike. `log_probs` (B, W) in nats, descending.
    """

    leaves: torch.Tensor
    log_probs: torch.Tensor


@torch.no_grad()
def beam_items(
    model,
    prompt_ids: Sequence[Sequence[int]],
    trie: SidTrie,
    *,
    beams: int,
    batch_size: int,
    pad_id: int,
    constrained: bool = True,
    bf16: bool = False,
) -> Beams:
    """The likeliest SIDs of the catalogue after each of B prompts, by beam search under the trie, on the CPU.

    A log-probability is the sum over the L code tokens of their log-softmax among the codes that the trie admits there,
    so that the catalogue's probabilities sum to 1; or, not `constrained`, over the full vocabulary, where what the
    model spends on other tokens is lost. `likelihood.continuation_log_likelihood` gives the same for prompt +
    `<|sid_begin|>` and the codes. `<|sid_begin|>` is fed and not scored: it is the same for all items. `<|sid_end|>` is
    neither: behind L codes nothing else may stand, and nothing that would be read follows.

    With `beams` at or above the number of distinct SIDs the search is exhaustive. Results do not depend on what else is
    in the batch but for float noise.

    Args:
        prompt_ids: token ids of each prompt without `<|sid_begin|>`, none empty.
        beams: width of the search, at least 1.
        constrained: as the model was trained, `mid_constrained`.
        batch_size: prompts read together, each once, and the beams of each behind it.
        bf16: run the model under bfloat16 autocast.

    Raises:
        ConfigurationError: an empty prompt, one that does not fit the model's sliding window, or `beams` or
            `batch_size` below 1.
    """
    if min(beams, batch_size) < 1 or not all(prompt_ids):
        raise ConfigurationError(
            f"no search with {beams} beams, {batch_size} prompts a batch, and "
            f"{sum(not ids for ids in prompt_ids)} empty prompts",
            why="it needs at least one beam and one prompt a batch, and a prompt at least one token",
            do="raise the number that is 0, or leave out users without a history",
        )
    check_window(model, max(map(len, prompt_ids), default=0) + 1 + trie.levels)
    width = min(beams, trie.nodes(trie.levels))
    found = Beams(torch.empty(len(prompt_ids), width, dtype=torch.long), torch.empty(len(prompt_ids), width))
    by_length = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))  # the largest batch first
    trie = trie.to(model.device)
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for start in progress(range(0, len(by_length), batch_size), "beam search"):
            chunk = by_length[start : start + batch_size]
            leaves, log_probs = _search(model, [prompt_ids[i] for i in chunk], trie, beams, pad_id, constrained)
            found.leaves[chunk], found.log_probs[chunk] = leaves.cpu(), log_probs.cpu()
    return found


def item_scores(beams: Beams, trie: SidTrie) -> torch.Tensor:
    """Scores (B, N + 1) of the full catalogue, float64: an item has the log-probability of its SID.

    Items that no beam names are at UNREACHED, padding (column 0) is at -inf. A leaf that a row names twice (beams of
    several traces side by side) counts with its best beam. Items that share an SID tie, and so do the unreached:
    RecBole's evaluator takes `torch.topk` of a row, which breaks ties by position, so a target would be hit by luck.
    Give it `target_last` of these rows.
    """
    by_leaf = torch.full((len(beams.leaves), trie.nodes(trie.levels)), UNREACHED, dtype=torch.float64)
    by_leaf.scatter_reduce_(1, beams.leaves, beams.log_probs.double(), "amax")
    return torch.nn.functional.pad(by_leaf[:, trie.leaf_of], (1, 0), value=-torch.inf)


def target_last(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score rows (B, N + 1) with each row's target (B,) just below the items that it ties with.

    An SID of m items then occupies m places with the target at the last of them: generating it does not tell the target
    from the others, and GR2 counts no such hit. The label only ever lowers a row's metrics, and no other score changes.

    The step down is the smallest of the rows' type, so float64 rows that hold float32 numbers, as those of
    `item_scores`, keep the target above everything that scored less.

    >>> target_last(torch.tensor([[-torch.inf, -1.0, -1.0, -2.0]]), torch.tensor([1])).argsort(descending=True)
    tensor([[2, 1, 3, 0]])
    """
    column = targets.unsqueeze(1)
    own = scores.gather(1, column)
    return scores.scatter(1, column, own.nextafter(torch.full_like(own, -torch.inf)))


def search(
    logits: torch.Tensor,
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    trie: SidTrie,
    beams: int,
    *,
    constrained: bool,
) -> Beams:
    """Beam search under the trie for B prompts, whatever model reads them; results stay on the device of `logits`.

    A depth holds min(beams, nodes of that depth) beams in every row, and never lacks one: either all its nodes are
    beams, and all nodes of the next depth are their children, or `beams` nodes are, with a child or more each.

    Args:
        logits: (B, V), of the first code of each prompt.
        step: given rows (R,) of its last call (at first: of the prompts) that the beams go on from, prompt by prompt,
            and the token (R, 1) that each adds, returns the logits (R, V) of the next code.
        constrained: a code's probability is that among the codes the trie admits, not among all V. The rest of an SID
            is then certain once one SID alone begins so, and is not read; else R is W a prompt.
    """
    prompt = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    nodes = torch.zeros_like(prompt)  # (B, W), at first the root alone
    scores = torch.zeros(len(logits), 1, device=logits.device)
    fed = torch.ones_like(nodes, dtype=torch.bool)  # the beams that `logits` has a row of, in this order
    for depth in range(trie.levels):
        children, real = trie.children(depth, nodes)  # (B, W, D)
        logits = logits.float()
        admitted = logits.gather(-1, trie.tokens[depth][children[fed]]).masked_fill(~real[fed], -torch.inf)
        steps = torch.zeros(real.shape, device=logits.device).masked_fill(~real, -torch.inf)
        steps[fed] = admitted - (admitted if constrained else logits).logsumexp(-1, keepdim=True)
        paths = (scores.unsqueeze(-1) + steps).flatten(1)
        scores, chosen = paths.topk(min(beams, trie.nodes(depth + 1)))
        parents = prompt * nodes.size(1) + chosen // trie.widths[depth]
        nodes = children.flatten(1).gather(1, chosen)
        if depth + 1 < trie.levels:
            rows = (fed.flatten().cumsum(0) - 1)[parents]
            fed = trie.forks[depth + 1][nodes] if constrained else torch.ones_like(nodes, dtype=torch.bool)
            logits = step(rows[fed], trie.tokens[depth][nodes[fed]].unsqueeze(1)) if fed.any() else logits[:0]
    return Beams(nodes, scores)


def _search(
    model, prompts: Sequence[Sequence[int]], trie: SidTrie, beams: int, pad_id: int, constrained: bool
) -> Beams:
    """`search` of one batch with a decoder-only language model.

    The beams of a prompt are read side by side in one sequence behind it, each seeing the prompt and its own codes: the
    cache holds a prompt once, and no beam that goes on takes a copy along.
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
    place = mask.sum(dim=1, keepdim=True)  # (B, 1), of the next token
    prompt, seen = torch.arange(len(ids), device=ids.device), mask.bool()  # of each row: its prompt, its cache entries

    def step(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal place, prompt, seen
        prompt, seen = prompt[rows], seen[rows]
        column = torch.arange(len(rows), device=rows.device) - torch.searchsorted(prompt, prompt)
        width, before = int(column.max()) + 1, seen.size(1)
        ids = tokens.new_full((len(place), width), pad_id)
        ids[prompt, column] = tokens.squeeze(1)
        sees = torch.eye(before + width, dtype=torch.bool, device=rows.device)[before:].repeat(len(place), 1, 1)
        sees[prompt, column, :before] = seen
        logits = model(
            input_ids=ids,
            attention_mask=attention_bias(sees, model),
            use_cache=True,
            position_ids=place.expand(-1, width),
            past_key_values=cache,
        ).logits
        place, seen = place + 1, sees[prompt, column]
        return logits[prompt, column]

    return search(logits, step, trie, beams, constrained=constrained)
