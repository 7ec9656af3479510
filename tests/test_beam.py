"""The trie compared with a set of SIDs, beam search compared with exhaustive scoring, and collisions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.beam import UNREACHED, Beams, SidTrie, beam_items, item_scores, target_last
from recbole_gr2.llm.beam import search as search_steps
from recbole_gr2.llm.likelihood import continuation_log_likelihood
from recbole_gr2.sid.tokens import SID_BEGIN, added_tokens

PAD, BEGIN, LEVELS, CODES = 0, 10, 3, 5
TOKENS = 20 + np.arange(LEVELS * CODES).reshape(LEVELS, CODES)
VOCABULARY = 40
PROMPTS = [[2, 3, 4, 5, 6, 7], [8, 9], [11, 12, 13, 4], [3], [5, 5, 5, 5, 5, 5, 5, 5, 5]]
SIZES = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": PAD,
}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=0.5,
            **SIZES,
        )
    )


def gpt2():
    """A model with learned positions: a shifted prompt is another prompt."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES))


def mistral():
    """A sliding window as long as the longest prompt and its SID."""
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=13,
            **SIZES,
        )
    )


def untrained(build):
    torch.manual_seed(0)
    return build().eval()


@pytest.fixture(scope="module", params=[llama, gpt2, mistral])
def any_model(request):
    return untrained(request.param)


@pytest.fixture(scope="module")
def model():
    return untrained(llama)


@pytest.fixture(scope="module")
def codes():
    """40 items whose SIDs are 30 of the 125, no first code 4, and uneven branches."""
    rng = np.random.default_rng(0)
    distinct = rng.permutation(4 * CODES * CODES)[:30]
    return np.stack(np.unravel_index(rng.permutation(np.r_[distinct, distinct[:10]]), (4, CODES, CODES)), axis=1)


@pytest.fixture(scope="module")
def trie(codes):
    return SidTrie.build(codes, TOKENS, begin_id=BEGIN)


def items_of(trie, leaf) -> list[int]:
    """The items of a leaf."""
    return trie.items[trie.starts[-1][leaf] : trie.starts[-1][leaf + 1]].tolist()


def leaf_codes(trie, codes) -> list[tuple[int, ...]]:
    """The SID of each leaf."""
    return [tuple(codes[items_of(trie, leaf)[0] - 1].tolist()) for leaf in range(trie.nodes(trie.levels))]


def search(model, trie, prompts=PROMPTS, *, beams=7, batch_size=8, constrained=False) -> Beams:
    return beam_items(model, prompts, trie, beams=beams, batch_size=batch_size, pad_id=PAD, constrained=constrained)


def next_log_probs(model, ids) -> torch.Tensor:
    """Log-softmax (V,) of the token after `ids`, from one forward pass without cache and padding."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


# --- the trie --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data(), levels=st.integers(1, 4), count=st.integers(1, 4))
def test_the_trie_admits_exactly_the_sids_of_the_catalog(data, levels, count):
    sid = st.tuples(*[st.integers(0, count - 1)] * levels)
    table = data.draw(st.lists(sid, min_size=1, max_size=30))
    tokens = data.draw(st.permutations(range(100, 100 + levels * count)))
    tokens = np.array(tokens).reshape(levels, count)
    trie = SidTrie.build(np.array(table), tokens, begin_id=BEGIN)

    paths = {0: ()}  # node of this depth -> the tokens that lead there
    for depth in range(levels):
        below = {}
        for node, path in paths.items():
            children, real = trie.children(depth, torch.tensor(node))
            assert children.shape == (trie.widths[depth],) and real.any()
            assert set(children[~real].tolist()) <= {children[0].item()}
            below |= {child: (*path, trie.tokens[depth][child].item()) for child in children[real].tolist()}
        paths = below
        assert sorted(paths) == list(range(trie.nodes(depth + 1)))
    written = {sid: tuple(tokens[level, code] for level, code in enumerate(sid)) for sid in table}
    assert len(paths) == len(set(table)) and set(paths.values()) == set(written.values())
    for leaf, sid in enumerate(sorted(set(table))):  # leaves are numbered by their codes
        sharing = [item for item, other in enumerate(table, 1) if other == sid]
        assert paths[leaf] == written[sid] and items_of(trie, leaf) == sharing
        assert trie.leaf_of[torch.tensor(sharing) - 1].tolist() == [leaf] * len(sharing)


def test_the_trie_by_hand():
    trie = SidTrie.build([(1, 0), (0, 2), (1, 1), (0, 2)], [(10, 11, 12), (20, 21, 22)], begin_id=BEGIN)
    assert [part.tolist() for part in trie.tokens] == [[10, 11], [22, 20, 21]]
    assert [part.tolist() for part in trie.starts] == [[0, 2], [0, 1, 3], [0, 2, 3, 4]]
    assert trie.items.tolist() == [2, 4, 1, 3] and trie.leaf_of.tolist() == [1, 0, 2, 0]
    assert trie.widths == (2, 2, 2) and trie.levels == 2 and [trie.nodes(depth) for depth in range(3)] == [1, 2, 3]


def test_the_trie_of_a_tokenizer(codes, trie):
    words = {"<pad>": 0, **{token: number for number, token in enumerate(added_tokens(LEVELS, CODES, 2), 7)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    made = SidTrie.of(tokenizer, codes)
    assert made.begin_id == words[SID_BEGIN]
    assert made.tokens[1][0] == words[f"<s_b_{codes[codes[:, 0] == 0][:, 1].min()}>"]
    assert [part.tolist() for part in made.starts] == [part.tolist() for part in trie.starts]
    with pytest.raises(ConfigurationError, match=r"no token for 3 parts .* e.g. <s_a_5>"):
        SidTrie.of(tokenizer, codes + np.array([0, 0, 1]))


@pytest.mark.parametrize(
    ("table", "tokens"),
    [
        (np.zeros((0, 3), int), TOKENS),
        ([(0, 1)], TOKENS),  # two levels of three
        ([(0, 1, 5)], TOKENS),
        ([(0, 1, -1)], TOKENS),  # would be the last code
        ([(0, 1, 2)], np.zeros_like(TOKENS)),  # an unknown token for all
    ],
)
def test_codes_without_tokens_are_an_error(table, tokens):
    with pytest.raises(ConfigurationError, match="cannot be written with tokens"):
        SidTrie.build(table, tokens, begin_id=BEGIN)


def test_where_semantic_ids_begin(trie, codes):
    first, second = ([int(TOKENS[level, code]) for level, code in enumerate(codes[n])] for n in (0, 1))
    text = [BEGIN, *first, 2, *second[:2], 2, *second, *first, first[0]]  # two whole ones side by side, one cut short
    assert trie.begins(torch.tensor(text)).tolist() == [1, 8, 11]
    assert trie.begins(torch.tensor(first[:2])).tolist() == []
    others = {tuple(row) for row in np.ndindex(4, CODES, CODES)} - {tuple(row) for row in codes.tolist()}
    stranger = [int(TOKENS[level, code]) for level, code in enumerate(sorted(others)[0])]  # codes that no item has
    assert trie.begins(torch.tensor([2, *stranger, 2, *second])).tolist() == [5]


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("beams", [30, 1000])
def test_enough_beams_are_an_exhaustive_search(any_model, trie, codes, beams, constrained):
    result = search(any_model, trie, beams=beams, batch_size=3, constrained=constrained)
    sids = leaf_codes(trie, codes)
    assert result.leaves.shape == result.log_probs.shape == (len(PROMPTS), 30)
    assert result.leaves.sort().values.tolist() == [list(range(30))] * len(PROMPTS)
    continuations = [[int(TOKENS[level, code]) for level, code in enumerate(sid)] for sid in sids]
    exact = continuation_log_likelihood(
        any_model,
        [[*prompt, BEGIN] for prompt in PROMPTS],
        [continuations] * len(PROMPTS),
        pad_id=PAD,
        trie=trie if constrained else None,
    )
    torch.testing.assert_close(result.log_probs, torch.tensor(exact).gather(1, result.leaves), atol=1e-4, rtol=0)
    total = result.log_probs.exp().sum(1)
    assert (result.log_probs.diff() <= 0).all()
    assert (total < 0.99).all() if not constrained else total.tolist() == pytest.approx([1.0] * len(total), abs=1e-4)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("beams", [1, 2, 5, 12])
def test_the_search_is_that_of_the_textbook(any_model, trie, codes, beams, constrained):
    """Width 1 is greedy. Each depth has the best `beams` continuations of the beams, from whole forward passes."""
    sids = leaf_codes(trie, codes)
    result = search(any_model, trie, beams=beams, constrained=constrained)
    for prompt, leaves, log_probs in zip(PROMPTS, *result, strict=True):
        kept = [(0.0, ())]
        for level in range(LEVELS):
            paths = []
            for score, path in kept:
                written = [int(TOKENS[n, code]) for n, code in enumerate(path)]
                step = next_log_probs(any_model, [*prompt, BEGIN, *written])
                following = {sid[level] for sid in sids if sid[:level] == path}
                if constrained:
                    step = step - step[[int(TOKENS[level, code]) for code in following]].logsumexp(0)
                paths += [(score + step[TOKENS[level, code]].item(), (*path, code)) for code in following]
            kept = sorted(paths, reverse=True)[:beams]
        assert [sids[leaf] for leaf in leaves] == [path for _, path in kept]
        assert log_probs.tolist() == pytest.approx([score for score, _ in kept], abs=1e-4)


@pytest.mark.parametrize(
    ("constrained", "rows"),
    [
        (True, [[0, 1], [0, 1]]),
        (False, [[0, 0, 1, 1], [0, 0, 1, 2, 2, 3]]),
    ],
)
def test_certain_codes_are_not_read(constrained, rows):
    """000, 001 and 012 share their first code. Only 100 has its first code, and only 012 its first two."""
    trie = SidTrie.build([(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 0, 0)], np.arange(9).reshape(3, 3), begin_id=9)
    assert [part.tolist() for part in trie.forks] == [[True], [True, False], [True, False, False]]
    read = []

    def step(rows, tokens):
        read.append((rows.tolist(), tokens.flatten().tolist()))
        return torch.zeros(len(rows), 9)

    prompts = torch.zeros(2, 9).index_fill(1, torch.tensor([0]), 5.0)  # the first code is 0, all others are even
    result = search_steps(prompts, step, trie, 4, constrained=constrained)
    assert [sorted(row) for row, _ in read] == rows
    if constrained:
        assert [tokens for _, tokens in read] == [[0, 0], [3, 3]]
        first = torch.tensor([5.0, 0.0]).softmax(0)
        expected = (first[0] * torch.tensor([1 / 4, 1 / 4, 1 / 2, 0]) + first[1] * torch.tensor([0, 0, 0, 1.0])).log()
        torch.testing.assert_close(result.log_probs, expected.gather(0, result.leaves.flatten()).view(2, 4))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), beams=st.integers(1, 40))
def test_an_untrained_model_gives_only_valid_sids(model, data, beams):
    sid = st.tuples(*[st.integers(0, CODES - 1)] * LEVELS)
    table = data.draw(st.lists(sid, min_size=1, max_size=20))
    trie = SidTrie.build(table, TOKENS, begin_id=BEGIN)
    result = search(model, trie, PROMPTS[:2], beams=beams)
    width = min(beams, len(set(table)))
    assert result.leaves.shape == (2, width) and result.log_probs.isfinite().all()
    for row in result.leaves.tolist():
        assert len(set(row)) == width and set(row) <= set(range(len(set(table))))


def test_a_model_that_forbids_every_code_still_gives_valid_sids(trie):
    """All paths have probability 0, as the padding of uneven branches."""

    def silent(input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., TOKENS.flatten()] = -torch.inf
        return SimpleNamespace(logits=logits)

    silent.device, silent.dtype, silent.training = torch.device("cpu"), torch.float32, False
    silent.config = SimpleNamespace()
    silent.eval = silent.train = lambda *mode: silent
    result = search(silent, trie, beams=9)
    assert result.leaves.shape == (5, 9) and (result.log_probs == -math.inf).all()
    assert result.leaves.min() >= 0 and result.leaves.max() < 30


def test_neither_the_batch_nor_its_padding_changes_a_result(any_model, trie):
    alone = [search(any_model, trie, [prompt]) for prompt in PROMPTS]
    for batch_size in (1, 2, 5, 64):
        result = search(any_model, trie, batch_size=batch_size)
        assert result.leaves.tolist() == [row.leaves[0].tolist() for row in alone]
        torch.testing.assert_close(result.log_probs, torch.cat([row.log_probs for row in alone]), atol=1e-4, rtol=0)
    turned = search(any_model, trie, PROMPTS[::-1])
    assert turned.leaves.flip(0).tolist() == result.leaves.tolist()
    assert len({tuple(row) for row in result.leaves.tolist()}) > 1  # prompts matter


def test_the_models_own_generation_config_and_mode_are_left_alone(trie):
    model = untrained(llama)
    expected = search(model, trie)
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=5.0, suppress_tokens=[20, 21])
    model.train()
    assert torch.equal(search(model, trie).leaves, expected.leaves) and model.training


def test_bf16_gives_similar_scores(model, trie):
    exact, rough = (
        item_scores(beam_items(model, PROMPTS, trie, beams=30, batch_size=8, pad_id=PAD, bf16=bf16), trie)[:, 1:]
        for bf16 in (False, True)
    )
    assert not torch.equal(exact, rough) and (exact - rough).abs().mean() < 0.3


def test_an_impossible_search_is_an_error(model, trie):
    with pytest.raises(ConfigurationError, match="1 empty prompts"):
        search(model, trie, [[2], []])
    with pytest.raises(ConfigurationError, match="no search with 0 beams"):
        search(model, trie, beams=0)
    with pytest.raises(ConfigurationError, match="0 prompts per batch"):
        search(model, trie, batch_size=0)
    with pytest.raises(ConfigurationError, match="have 14 tokens, but the window of the model has 13"):
        search(untrained(mistral), trie, [[2] * 10])
    with pytest.raises(ConfigurationError, match="have 14 tokens, but the window of the model has 13"):
        continuation_log_likelihood(untrained(mistral), [[2] * 11], [[[2, 3, 4]]], pad_id=PAD)
    assert search(model, trie, []).leaves.shape == (0, 7)


# --- scores of items --------------------------------------------------------------------------------------------

# Leaves: 0 = items 2 and 4, 1 = item 1, 2 = item 3, 3 = item 5.
SHARED = SidTrie.build([(1, 0), (0, 2), (1, 1), (0, 2), (2, 2)], [(10, 11, 12), (20, 21, 22)], begin_id=BEGIN)


def test_item_scores_by_hand():
    beams = Beams(torch.tensor([[2, 0], [3, 1]]), torch.tensor([[-0.5, -2.0], [-1.0, -3.0]]))
    low = UNREACHED
    assert item_scores(beams, SHARED).tolist() == [
        [-math.inf, low, -2.0, -0.5, -2.0, low],
        [-math.inf, -3.0, low, low, low, -1.0],
    ]
    twice = Beams(torch.tensor([[0, 2, 0]]), torch.tensor([[-2.0, -0.5, -1.0]]))  # the beams of two traces
    assert item_scores(twice, SHARED).tolist() == [[-math.inf, low, -1.0, -0.5, -1.0, low]]


def test_the_target_has_the_last_rank_of_a_collision():
    scores = item_scores(Beams(torch.tensor([[2, 0]]), torch.tensor([[-0.5, -2.0]])), SHARED)
    ranks = {}
    for target in range(1, 6):
        (row,) = target_last(scores, torch.tensor([target]))
        ranks[target] = row.topk(5).indices.tolist().index(target) + 1
    assert ranks == {3: 1, 2: 3, 4: 3, 1: 5, 5: 5}  # item 2 or 4: places 2 and 3; items 1 and 5 were not generated


@settings(max_examples=100, deadline=None)
@given(data=st.data(), width=st.integers(2, 12))
def test_a_target_ranks_after_its_ties_and_before_all_lower_scores(data, width):
    """With adjacent float32 numbers, for which the smallest step matters."""
    near = st.integers(0, 3).map(lambda n: -1.0 - n * 2**-23)
    values = data.draw(st.lists(st.one_of(near, st.just(UNREACHED)), min_size=width, max_size=width))
    target = data.draw(st.integers(1, width))
    scores = torch.tensor([[-math.inf, *values]], dtype=torch.float32).double()
    row = target_last(scores, torch.tensor([target]))
    rank = row[0].topk(width).indices.tolist().index(target) + 1
    assert rank == sum(value >= scores[0, target] for value in scores[0].tolist())
    others = [item for item in range(width + 1) if item != target]
    assert torch.equal(row[0, others], scores[0, others])


def test_the_evaluator_of_recbole_reads_these_scores():
    from recbole.evaluator import Collector, Evaluator

    from recbole_gr2 import compat

    compat.apply()
    scores = item_scores(Beams(torch.tensor([[2, 0]] * 3), torch.tensor([[-0.5, -2.0]] * 3)), SHARED)
    targets = torch.tensor([3, 2, 5])  # first; in the collision at places 2 and 3; not generated
    config = {
        "metrics": ["Recall", "MRR", "GAUC"],
        "topk": [1, 2, 3, 4],
        "metric_decimal_place": 6,
        "eval_args": {"mode": "full"},
        "device": "cpu",
    }
    config = type("Config", (dict,), {"__missing__": lambda self, key: None})(config)
    collector = Collector(config)
    collector.eval_batch_collect(target_last(scores, targets), None, torch.arange(3), targets)
    metrics = Evaluator(config).evaluate(collector.get_data_struct())
    expected = {"recall@1": 1, "recall@2": 1, "recall@3": 2, "recall@4": 2, "mrr@4": 1 + 1 / 3}
    for name, total in expected.items():
        assert metrics[name] == pytest.approx(total / 3, abs=1e-5), name
    assert metrics["gauc"] == pytest.approx((4 / 4 + 2 / 4 + 0 / 4) / 3)  # share of the 4 others that rank below it
