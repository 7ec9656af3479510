"""The grammar, generation with a tiny model, and reading rankings from completions."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm import attention, generation, kv_cache
from recbole_gr2.llm.answers import read_answer
from recbole_gr2.llm.attention import attend_in_float32
from recbole_gr2.llm.generation import generate_rankings
from recbole_gr2.llm.grammar import FREE, Grammar, GrammarProcessor, constrained_log_probs, prior_tensor
from recbole_gr2.llm.inputs import left_pad
from recbole_gr2.llm.kv_cache import PreallocatedLayer, preallocated_cache
from recbole_gr2.llm.model import load_language_model, load_saved, save_language_model
from recbole_gr2.sid.tokens import RANKING, added_tokens, label_tokens
from recbole_gr2.types import Candidate, Request

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(48))]
LABELS = label_tokens(5)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_tokens([RANKING, *LABELS])
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def grammar(tokenizer):
    return Grammar.of(tokenizer, RANKING, LABELS, max_reasoning=4)


MARK, A, B, C, D, E = range(50, 56)
EOS, PAD = 1, 0
PROMPTS = [[2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [3]]
COUNTS = [5, 3, 4, 1]
PRIORS = [[0.0, 1.0, -1.0, 0.5, 0.2][:count] for count in COUNTS]


def flat(grammar, count) -> torch.Tensor:
    """Equal priors for one list of `count` candidates."""
    return prior_tensor([[0.0] * count], grammar, torch.device("cpu"))


def allowed_tokens(grammar, ids, counts, cited=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each token is allowed, (B, O, V), and whether a position is forced, (B, O)."""
    phases = grammar.phases(ids, counts, cited)
    return grammar.mask(phases, 56), phases.only != FREE


def request(items=(10, 20, 30)) -> Request:
    candidates = tuple(Candidate(item_id=item, score=-rank, rank=rank) for rank, item in enumerate(items, 1))
    return Request(
        request_id="r", user_token="u", split="train", history=(), candidates=candidates, target=20, provider="p"
    )


# --- the grammar ---------------------------------------------------------------------------------------------------


def test_grammar_of_a_tokenizer(tokenizer, grammar):
    assert (grammar.ranking_id, grammar.label_ids, grammar.eos_id, grammar.pad_id) == (MARK, (A, B, C, D, E), EOS, PAD)
    with pytest.raises(ConfigurationError, match=r"no token for <\|F\|>"):
        Grammar.of(tokenizer, RANKING, label_tokens(6), max_reasoning=4)


def test_allowed_position_by_position(grammar):
    reasoning = set(range(56)) - {A, B, C, D, E, EOS, PAD}
    ids = torch.tensor([[7, 8, MARK, B, A, C, EOS, PAD], [7, 8, 9, 9, MARK, A, B, EOS], [MARK, A, EOS] + [PAD] * 5])
    expected = [
        [reasoning, reasoning, reasoning, {A, B, C}, {A, C}, {C}, {EOS}, {PAD}],
        [reasoning, reasoning, reasoning, reasoning, {MARK}, {A, B}, {B}, {EOS}],  # the limit of 4 forces the mark
        [reasoning, {A}, {EOS}, {PAD}, {PAD}, {PAD}, {PAD}, {PAD}],
    ]
    allowed, forced = allowed_tokens(grammar, ids, torch.tensor([3, 2, 1]))
    assert [[set(cell.nonzero().flatten().tolist()) for cell in row] for row in allowed] == expected
    assert forced.tolist() == [[len(cell) == 1 for cell in row] for row in expected]


def test_without_reasoning_the_mark_is_forced_at_once(tokenizer):
    grammar = Grammar.of(tokenizer, RANKING, LABELS, max_reasoning=0)
    phases = grammar.phases(torch.tensor([[MARK, B, A, EOS]]), torch.tensor([2]))
    assert phases.only.tolist() == [[MARK, FREE, A, EOS]]
    assert not grammar.was_truncated([MARK, B, A, EOS])


def test_was_truncated(grammar):
    assert grammar.was_truncated([7, 7, 7, 7, MARK, A, B, EOS])
    assert not grammar.was_truncated([7, 7, 7, MARK, A, B, EOS])
    assert not grammar.was_truncated([7, 7])


def test_log_probs_by_hand(grammar):
    logits = torch.zeros(1, 5, 56)
    logits[0, 0, 7], logits[0, 0, A] = math.log(3), 100.0  # a label in the reasoning is forbidden, however likely
    logits[0, 1, MARK] = 2 * math.log(2)
    logits[0, 2, A], logits[0, 2, B], logits[0, 2, D] = math.log(2), 0.0, 50.0  # D is beyond K
    ids = torch.tensor([[7, MARK, B, A, EOS]])
    log_probs, entropy = constrained_log_probs(logits, ids, flat(grammar, 2), grammar, temperature=2.0)
    words = 56 - 7  # all but five labels, eos and pad
    root3, root2 = math.sqrt(3), math.sqrt(2)
    expected = [math.log(root3 / (root3 + words - 1)), math.log(2 / (2 + words - 1)), math.log(1 / (1 + root2)), 0, 0]
    torch.testing.assert_close(log_probs, torch.tensor([expected]))
    p = root2 / (1 + root2)
    torch.testing.assert_close(entropy[0, 2].item(), -(p * math.log(p) + (1 - p) * math.log(1 - p)))
    assert log_probs[0, 3:].tolist() == entropy[0, 3:].tolist() == [0, 0]  # forced


def test_what_the_grammar_forbids_has_no_probability(grammar):
    logits = torch.zeros(1, 4, 56)
    for ids, position in [([A, 7, 7, 7], 0), ([MARK, A, A, B], 2), ([MARK, A, B, A], 3), ([MARK, 7, A, B], 1)]:
        log_probs, _ = constrained_log_probs(logits, torch.tensor([ids]), flat(grammar, 3), grammar, 1.0)
        assert log_probs[0, position] == -math.inf and log_probs[0, :position].isfinite().all()


def test_probabilities_sum_to_one_and_match_the_full_mask(model, grammar):
    """For all rankings of 3 labels after one word, and compared with a softmax under the (B, O, V) mask."""
    from itertools import permutations

    ids = torch.tensor([[7, MARK, A + a, A + b, A + c, EOS] for a, b, c in permutations(range(3))])
    counts = torch.full((6,), 3)
    logits = model(torch.cat([torch.tensor([[2]] * 6), ids], dim=1)).logits[:, :-1]
    prior = prior_tensor([[0.0, 2.0, -1.0]] * 6, grammar, torch.device("cpu"))
    log_probs, _ = constrained_log_probs(logits, ids, prior, grammar, 0.7)
    assert log_probs[:, 2:].sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    allowed, forced = allowed_tokens(grammar, ids, counts)
    logits[..., A : A + 3] += torch.tensor([0.0, 2.0, -1.0])
    reference = (logits / 0.7).masked_fill(~allowed, -math.inf).log_softmax(-1).gather(-1, ids.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(log_probs, reference)
    assert (log_probs[forced] == 0).all()


def test_the_prior_by_hand(grammar):
    """P(label) is proportional to P_LLM(label) * P_prior(label). A label with -inf is not allowed."""
    logits = torch.zeros(1, 3, 56)
    logits[0, 1, A], logits[0, 1, B] = math.log(3), math.log(2)
    prior = prior_tensor([[math.log(0.2), math.log(0.5), math.log(0.3)]], grammar, torch.device("cpu"))
    assert prior.tolist()[0][3:] == [-math.inf, -math.inf]
    log_probs, _ = constrained_log_probs(logits, torch.tensor([[MARK, B, A]]), prior, grammar, 1.0)
    assert log_probs[0, 1].exp().item() == pytest.approx(2 * 0.5 / (3 * 0.2 + 2 * 0.5 + 1 * 0.3))
    assert log_probs[0, 2].exp().item() == pytest.approx(0.2 / (0.2 + 0.3))  # no logits at that position


def test_a_strong_prior_decides(model, grammar):
    for order in ([2, 0, 1], [1, 2, 0]):
        prior = [-50.0 * order.index(n) for n in range(3)]
        (ids,) = generate_rankings(model, [PROMPTS[1]], [prior], grammar=grammar)
        assert ids[ids.index(MARK) + 1 :] == [*(A + n for n in order), EOS]


def test_gradient_is_finite_and_reaches_only_free_positions(grammar):
    logits = torch.randn(1, 6, 56, requires_grad=True)
    ids = torch.tensor([[7, MARK, B, A, C, EOS]])
    constrained_log_probs(logits, ids, flat(grammar, 3), grammar, 1.0)[0].sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0].abs().sum(-1) > 0).tolist() == [True, True, True, True, False, False]


# --- grounded reasoning ---------------------------------------------------------------------------------

BEGIN, END = 20, 21
GROUNDED = Grammar(MARK, (A, B, C, D, E), EOS, PAD, 7, sid_ids=(BEGIN, END), code_ids=tuple(range(22, 30)), levels=2)
SHOWN = [5, BEGIN, 22, 25, END, 6, BEGIN, 22, 26, END, BEGIN, 23, 25, END, BEGIN, 22, 25, END]  # the first one twice


NONE = torch.zeros(1, 5)


def test_what_a_prompt_shows():
    prompts = torch.tensor([[PAD] * 3 + SHOWN, SHOWN[:5] + [4] * 16])
    first, second, third = ([BEGIN, *codes, END, FREE] for codes in ((22, 25), (22, 26), (23, 25)))
    none = [FREE] * 5
    assert GROUNDED.cited(prompts, NONE.repeat(2, 1)).tokens.tolist() == [
        [first, second, third, first],
        [first, none, none, none],
    ]
    assert GROUNDED.cited(torch.tensor([[4, 5, 6]]), NONE).tokens.tolist() == [[none]]
    assert GROUNDED.cited(torch.tensor([SHOWN[:-1]]), NONE).tokens.tolist() == [[first, second, third]]  # cut off
    assert replace(GROUNDED, sid_ids=None).cited(prompts, NONE.repeat(2, 1)) is None
    labelled = torch.tensor([[*SHOWN[:10], B, *SHOWN[10:14], A]])  # after the second and the third
    prior = torch.tensor([[-1.0, -2.0, -torch.inf, -torch.inf, -torch.inf]])
    cited = GROUNDED.cited(labelled, prior)
    assert cited.tokens.tolist() == [[first, [*second[:-1], B], [*third[:-1], A]]]
    assert cited.prior.tolist() == [[-2.0, -2.0, -1.0]]


@pytest.mark.parametrize("stray", [[BEGIN], [END], [BEGIN, END], [END, BEGIN], [BEGIN, 22], [BEGIN, 22, 25, 26, END]])
def test_stray_tokens_of_semantic_ids_change_no_other_list(stray):
    """Neither the other IDs of the same prompt nor the allowed tokens of another prompt in the batch."""
    alone = GROUNDED.cited(torch.tensor([SHOWN]), NONE)
    prompts = torch.tensor([[PAD] * len(stray) + SHOWN, stray + SHOWN])
    cited = GROUNDED.cited(prompts, NONE.repeat(2, 1))
    assert cited.tokens.tolist() == alone.tokens.tolist() * 2
    ids = torch.tensor([[7, BEGIN, 22, 26, END, MARK, A, B, EOS]])
    expected, _ = allowed_tokens(GROUNDED, ids, torch.tensor([2]), alone)
    allowed, _ = allowed_tokens(GROUNDED, ids.repeat(2, 1), torch.tensor([2, 2]), cited)
    assert torch.equal(allowed, expected.repeat(2, 1, 1))


def test_the_number_of_levels_is_that_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(added_tokens(levels=3, codes=2, candidates=5))
    assert Grammar.of(tokenizer, RANKING, LABELS, 4, grounded=True).levels == 3
    assert Grammar.of(tokenizer, RANKING, LABELS, 4, grounded=True, levels=2).levels == 2


def test_a_cited_id_is_one_that_the_prompt_shows():
    words = set(range(56)) - {A, B, C, D, E, EOS, PAD, END} - set(range(22, 30))
    ids = torch.tensor(
        [
            [7, BEGIN, 22, 26, END, MARK, A, B, EOS],
            [BEGIN, 23, 25, END, 7, 8, 9, MARK, A],
            [BEGIN, 24, 7, BEGIN, 22, MARK, A, B, EOS],  # a code that it does not show, and a mark inside
            [7, 7, 7, 7, 7, BEGIN, 22, 25, A],  # the limit of 7 stands in it
        ]
    )
    expected = [
        [words, words, {22, 23}, {25, 26}, {END}, words, {A, B}, {B}, {EOS}],
        [words, {22, 23}, {25}, {END}, words, words, words, {MARK}, {A, B}],
        [words, {22, 23}, {END}, {END}, {22, 23}, {25, 26}, {A, B}, {B}, {EOS}],
        [words, words, words, words, words, words, {22, 23}, {MARK}, {MARK}],
    ]
    cited = GROUNDED.cited(torch.tensor([SHOWN] * 4), NONE.repeat(4, 1))
    allowed, forced = allowed_tokens(GROUNDED, ids, torch.tensor([2] * 4), cited)
    assert [[set(cell.nonzero().flatten().tolist()) for cell in row] for row in allowed] == expected
    assert forced.tolist() == [[len(cell) == 1 for cell in row] for row in expected]
    phases = GROUNDED.phases(ids, torch.tensor([2] * 4), cited)
    kinds = torch.stack([phases.reasoning, phases.labels.any(-1), phases.only != FREE, (phases.copies != FREE).any(-1)])
    assert (kinds.sum(0) == 1).all()
    labelled = torch.tensor([[5, 5, *SHOWN[:10], B, *SHOWN[10:]], [*SHOWN[:5], A, *SHOWN[5:10], B, *SHOWN[10:], C]])
    ids = torch.tensor([[7, BEGIN, 22, 26, END, B, 7, MARK, B, A], [BEGIN, 22, 25, END, C, 7, 7, MARK, C, A]])
    allowed, _ = allowed_tokens(GROUNDED, ids, torch.tensor([3] * 2), GROUNDED.cited(labelled, NONE.repeat(2, 1)))
    assert [set(cell.nonzero().flatten().tolist()) for cell in allowed[0]][4:8] == [{END}, {B}, words, {MARK}]
    assert [set(cell.nonzero().flatten().tolist()) for cell in allowed[1]][3:6] == [{END}, {A, C}, words]  # an ID twice
    nothing = allowed_tokens(GROUNDED, ids[:1], torch.tensor([2]), GROUNDED.cited(torch.tensor([[4, 5]]), NONE))[0]
    assert nothing[0, 2].nonzero().flatten().tolist() == [END]


@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_grounded_log_probs_match_the_full_mask(weight):
    """For random legal completions, compared with a softmax over (B, O, V) of logits and priors by hand.

    The processor of `generate` gives the same probabilities.
    """
    grammar = replace(GROUNDED, llm_weight=weight)
    prompts = torch.tensor([[*SHOWN[:10], B, *SHOWN[10:14], A, *SHOWN[14:]], [PAD] * 8 + [4, *SHOWN[5:15]] + [7]])
    prior = torch.tensor([[0.0, 2.0, -1.0, -torch.inf, -torch.inf], [-1.0, 0.5, -0.5, -torch.inf, -torch.inf]])
    ids_of = [{(22, 25): [-1.0] * 2, (22, 26): [2.0], (23, 25): [0.0]}, {(22, 26): [-1.0], (23, 25): [-1.0]}]
    cited = grammar.cited(prompts, prior)
    torch.manual_seed(0)
    several = 0
    for _ in range(20):
        walks, logits = [], torch.randn(2, 12, 56) * 3
        bias, scale = torch.zeros_like(logits), torch.ones_like(logits)
        for row in range(2):
            walk: list[int] = []
            for place in range(12):
                of_row = type(cited)(*(part[row : row + 1] for part in cited))
                allowed, _ = allowed_tokens(GROUNDED, torch.tensor([[*walk, PAD]]), torch.tensor([3]), of_row)
                open_ = allowed[0, -1].nonzero().flatten().tolist()
                if set(open_) <= set(range(22, 30)) or MARK in walk:  # a candidate is chosen
                    scale[row, place] = weight
                if set(open_) <= set(range(22, 30)):
                    begun = walk[len(walk) - walk[::-1].index(BEGIN) :]
                    for token in open_:
                        fits = [
                            value
                            for codes, values in ids_of[row].items()
                            for value in values
                            if [*codes[: len(begun) + 1]] == [*begun, token]
                        ]
                        bias[row, place, token] = 0.7 * (torch.tensor(fits) / 0.7).logsumexp(0)
                    several += len(open_) > 1
                if MARK in walk:
                    bias[row, place, A : A + 3] = prior[row, :3]
                likely = [BEGIN] if BEGIN in open_ and place % 2 else open_
                walk.append(likely[torch.randint(len(likely), ()).item()])
            walks.append(walk)
        ids = torch.tensor(walks)
        log_probs, entropy = constrained_log_probs(logits, ids, prior, grammar, 0.7, cited)
        allowed, forced = allowed_tokens(GROUNDED, ids, torch.tensor([3, 3]), cited)
        reference = ((scale * logits + bias) / 0.7).masked_fill(~allowed, -math.inf).log_softmax(-1)
        torch.testing.assert_close(log_probs, reference.gather(-1, ids.unsqueeze(-1))[..., 0])
        spread = -(reference.exp() * reference.clamp(min=-1e30)).sum(-1)
        torch.testing.assert_close(entropy, spread, atol=1e-5, rtol=1e-5)
        assert (log_probs[forced] == 0).all()
    assert several > 30
    processor = GrammarProcessor(grammar, prompts, prior, temperature=0.7)
    for place in range(12):
        scores = processor(torch.cat([prompts, ids[:, :place]], dim=1), logits[:, place]).log_softmax(-1)
        reference = (scale * logits + bias).masked_fill(~allowed, -math.inf).log_softmax(-1)[:, place]
        torch.testing.assert_close(scores, reference)
    foreign = torch.tensor([[BEGIN, 24, END, MARK, A, B, C, EOS]])
    of_first = type(cited)(*(part[:1] for part in cited))
    log_probs, _ = constrained_log_probs(torch.zeros(1, 8, 56), foreign, prior[:1], GROUNDED, 1.0, of_first)
    assert log_probs[0, 1] == -math.inf and log_probs[0, 2] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_id_written_token_by_token_follows_the_prior_of_its_candidate(temperature):
    """With a uniform language model, for all first codes that candidates share."""
    shown = [[BEGIN, 22, 25, END, A], [BEGIN, 22, 26, END, B], [BEGIN, 22, 27, END, C], [BEGIN, 23, 25, END, D]]
    prompts, prior = (
        torch.tensor([[5, *(token for sid in shown for token in sid)]]),
        torch.tensor([[0.3, 0.25, 0.05, 0.4, 0.0]]).log(),
    )
    cited = GROUNDED.cited(prompts, prior)
    logits = torch.zeros(1, 6, 56)
    log_probs = [
        constrained_log_probs(logits, torch.tensor([[*walk, 7]]), prior, GROUNDED, temperature, cited)[0][0, 1:5]
        for walk in shown
    ]
    expected = (prior[0, :4] / temperature).softmax(-1)
    torch.testing.assert_close(torch.stack(log_probs).sum(-1).exp(), expected)
    greedy = GrammarProcessor(GROUNDED, prompts, prior, temperature=0.0)
    ids = torch.cat([prompts, torch.tensor([[BEGIN]])], dim=1)
    while ids[0, -1] not in GROUNDED.label_ids:
        ids = torch.cat([ids, greedy(ids, torch.zeros(1, 56)).argmax(-1, keepdim=True)], dim=1)
    assert (
        ids[0, -5:].tolist() == shown[3]
    )  # the most likely one, although the first code of the others has a larger sum


def test_a_policy_cites_what_its_prompt_shows(model):
    """With a high temperature, at which the model alone would cite all IDs."""
    prompts = [SHOWN, [4, *SHOWN[5:14]], [4, 5, 6]]
    got = generate_rankings(
        model,
        prompts,
        [[0.0] * 3] * 3,
        grammar=replace(GROUNDED, max_reasoning=30),
        num_generations=100,
        temperature=20.0,
    )
    cited: dict[int, set] = {0: set(), 1: set(), 2: set()}
    for number, ids in enumerate(got):
        text = ids[: ids.index(MARK)]
        for place in (place for place, token in enumerate(text) if token == BEGIN and END in text[place:]):
            cited[number // 100].add(tuple(text[place : text.index(END, place) + 1]))
    first, second, third = ((BEGIN, *codes, END) for codes in ((22, 25), (22, 26), (23, 25)))
    assert cited == {0: {first, second, third}, 1: {second, third}, 2: {(BEGIN, END)}}


# --- generation ----------------------------------------------------------------------------------------------------


def plain_generation(model, grammar, prompt, prior):
    """One prompt through transformers' `generate`, no shared cache, no padding."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=PAD)
    label_prior = prior_tensor([prior], grammar, model.device)
    processors = LogitsProcessorList([GrammarProcessor(grammar, ids, label_prior, temperature=0.0)])
    output = model.generate(ids, generation_config=config, logits_processor=processors)
    return output[0, len(prompt) :].tolist()


def is_legal(grammar, ids, count) -> bool:
    allowed, _ = allowed_tokens(grammar, torch.tensor([ids]), torch.tensor([count]))
    return ids[-1] == EOS and allowed[0].gather(-1, torch.tensor(ids).unsqueeze(-1)).all().item()


def test_greedy_equals_plain_generation(model, grammar):
    got = generate_rankings(model, PROMPTS, PRIORS, grammar=grammar, num_generations=3, batch_size=6)
    plain = [plain_generation(model, grammar, prompt, prior) for prompt, prior in zip(PROMPTS, PRIORS, strict=False)]
    assert got == [ids for ids in plain for _ in range(3)]
    assert len({tuple(ids) for ids in plain}) == 4


@pytest.mark.parametrize(("temperature", "generations"), [(0.0, 1), (1.0, 4)])
@pytest.mark.parametrize("bf16", [False, True])
def test_spare_memory_in_the_cache_changes_no_token(model, grammar, monkeypatch, bf16, temperature, generations):
    def generate(spare):
        monkeypatch.setattr(kv_cache, "SPARE_TOKENS", spare)
        return generate_rankings(
            model, PROMPTS, PRIORS, grammar=grammar, num_generations=generations, bf16=bf16, temperature=temperature
        )

    much, little = generate(128), generate(1)
    monkeypatch.setattr(generation, "preallocated_cache", lambda model: DynamicCache(config=model.config))
    assert generate(128) == much == little


def test_a_preallocated_layer_contains_the_same_as_a_dynamic_one():
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)

    def update(batch, tokens):
        keys, values = torch.randn(2, batch, 2, tokens, 4, generator=generator)
        for one, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(one, other)

    update(2, 5)
    place = ours.keys.data_ptr()
    update(2, 1)
    assert ours.keys.data_ptr() == place  # written into the same buffer
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(3)
    update(6, 1)
    for layer in (ours, theirs):
        layer.crop(-2)
    update(6, 3)
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor([5, 0, 0, 1, 2, 3]))
    for _ in range(2):
        update(6, 100)  # more than SPARE_TOKENS
    assert ours.get_seq_length() == theirs.get_seq_length() == 208
    half = PreallocatedLayer()
    keys, values = half.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4, dtype=torch.bfloat16))
    assert keys.dtype == values.dtype == torch.float32  # on a CPU


def test_attention_on_a_cpu_is_in_float32_under_autocast():
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    key, value, mask = key[:, :2], value[:, :2], torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, :, 0] = False
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    exact, _ = attend_in_float32(module, query, key, value, mask, scaling=0.3)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        several, _ = attend_in_float32(module, query, key, value, mask, scaling=0.3)
        biased, _ = attend_in_float32(module, query, key, value, bias, scaling=0.3)
        single, _ = attend_in_float32(module, query[:, :, -1:], key, value, mask[:, :, -1:], scaling=0.3)
    torch.testing.assert_close(several, exact, rtol=0, atol=0)
    torch.testing.assert_close(biased, exact)
    torch.testing.assert_close(single, exact[:, -1:])


def test_a_loaded_model_attends_in_float32_and_is_saved_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_gr2.llm.model.device", lambda: "cpu")
    model, tokenizer = load_language_model("random", corpus=["a text"])
    assert model.config._attn_implementation == attention.FLOAT32
    save_language_model(model, tokenizer, tmp_path)
    assert attention.FLOAT32 not in (tmp_path / "config.json").read_text()
    loaded, _ = load_saved(tmp_path)
    assert loaded.config._attn_implementation == attention.FLOAT32
    monkeypatch.setattr("recbole_gr2.llm.model.device", lambda: "cuda")
    loaded, _ = load_saved(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("generations", [1, 50])
def test_reading_a_common_start_once_changes_no_token(model, monkeypatch, generations):
    """The start ends within a semantic ID, and one prompt is one token longer than the start."""
    start = [9, 4, BEGIN, 22]
    prompts = [[*start, *rest] for rest in ([25, END, A, 5, 6], [26, END, B, BEGIN, 23, 25, END, A], [7])]
    grammar, priors = replace(GROUNDED, max_reasoning=30), [[0.3, -0.1], [0.0, 0.5], [0.0]]

    def generate():
        return generate_rankings(
            model, prompts, priors, grammar=grammar, num_generations=generations, temperature=20.0, seed=3
        )

    assert generation.common_start(prompts) == start
    once = generate()
    assert generations == 1 or any({BEGIN, 22, 25, END} <= set(ids[:30]) for ids in once)
    monkeypatch.setattr(generation, "common_start", lambda prompts: [])
    assert generate() == once


def test_a_sliding_window_keeps_the_layer_of_transformers():
    config = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, max_window_layers=2, sliding_window=4)
    kinds = [type(layer).__name__ for layer in preallocated_cache(SimpleNamespace(config=config)).layers]
    assert kinds == ["PreallocatedLayer", "PreallocatedLayer", "DynamicSlidingWindowLayer"]


def test_samples_are_legal_and_depend_on_seed_and_prompt_alone(model, grammar):
    def sample(prompts, priors, **changes):
        settings_ = {"num_generations": 4, "temperature": 1.0, "batch_size": 64, "seed": 7} | changes
        return generate_rankings(model, prompts, priors, grammar=grammar, **settings_)

    first = sample(PROMPTS, PRIORS)
    assert len(first) == 16 and len({tuple(ids) for ids in first}) > 10
    assert all(is_legal(grammar, ids, COUNTS[row // 4]) for row, ids in enumerate(first))
    torch.manual_seed(123)  # the global generator is neither used nor changed
    state = torch.get_rng_state()
    assert sample(PROMPTS, PRIORS, batch_size=4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(PROMPTS[::-1], PRIORS[::-1]) == [ids for i in (3, 2, 1, 0) for ids in first[4 * i : 4 * i + 4]]
    assert sample(PROMPTS, PRIORS, seed=8) != first


def test_sampled_frequencies_follow_the_log_probs(model, tokenizer):
    grammar = Grammar.of(tokenizer, RANKING, LABELS, max_reasoning=0)
    got = generate_rankings(
        model, [PROMPTS[0]], [[1.0, 0.0, 0.5]], grammar=grammar, num_generations=1500, temperature=1.3, batch_size=1500
    )
    rankings = sorted({tuple(ids) for ids in got})
    ids = torch.tensor(rankings)
    logits = model(torch.cat([torch.tensor([PROMPTS[0]] * len(ids)), ids], dim=1)).logits[:, len(PROMPTS[0]) - 1 : -1]
    prior = prior_tensor([[1.0, 0.0, 0.5]] * len(ids), grammar, torch.device("cpu"))
    expected = constrained_log_probs(logits, ids, prior, grammar, 1.3)[0].sum(1).exp()
    shares = torch.tensor([got.count(list(ranking)) / 1500 for ranking in rankings])
    assert len(rankings) >= 4 and (shares - expected).abs().max() < 0.05  # four standard errors of a share


def test_the_models_own_generation_config_and_mode_are_left_alone(model, grammar):
    expected = generate_rankings(model, PROMPTS, PRIORS, grammar=grammar)
    theirs = model.generation_config
    leaking = GenerationConfig(do_sample=True, repetition_penalty=5.0, num_beams=3, suppress_tokens=[A, B, MARK])
    model.generation_config = leaking
    model.train()
    try:
        assert generate_rankings(model, PROMPTS, PRIORS, grammar=grammar) == expected
        assert model.generation_config is leaking and model.training
    finally:
        model.generation_config = theirs
        model.eval()


def test_generation_refuses_what_it_cannot_rank(model, grammar):
    with pytest.raises(ConfigurationError, match="a prompt of 1 tokens with 6 candidates"):
        generate_rankings(model, [[3]], [[0.0] * 6], grammar=grammar)
    with pytest.raises(ConfigurationError, match="a prompt of 0 tokens"):
        generate_rankings(model, [[]], [[0.0] * 2], grammar=grammar)


def test_left_pad():
    ids, mask = left_pad([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# --- reading answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "ranking", "status", "counts"),
    [
        ([7, MARK, C, A, B, EOS], (30, 10, 20), "ok", (0, 0, 0)),
        ([MARK, B, C, A], (20, 30, 10), "ok", (0, 0, 0)),  # no eos
        ([7, 7, 7, 7, MARK, C, A, B, EOS], (30, 10, 20), "truncated", (0, 0, 0)),
        ([MARK, C, EOS, A, B], (30, 10, 20), "repaired", (2, 0, 0)),  # tokens after eos are ignored
        ([MARK, C, C, B, EOS], (30, 20, 10), "repaired", (1, 1, 0)),
        ([MARK, C, D, B, A, EOS], (30, 20, 10), "repaired", (0, 0, 1)),  # D stands for no candidate
        ([MARK, C, 7, MARK, B, A, EOS], (30, 20, 10), "repaired", (0, 0, 2)),
        ([C, B, A, EOS], (10, 20, 30), "unreadable", (3, 0, 0)),  # labels without a ranking mark
        ([7, EOS, MARK, C, B, A], (10, 20, 30), "unreadable", (3, 0, 0)),
        ([MARK, 9, EOS], (10, 20, 30), "unreadable", (3, 0, 1)),
        ([], (10, 20, 30), "unreadable", (3, 0, 0)),
    ],
)
def test_read_answer(ids, ranking, status, counts, grammar, tokenizer):
    answer = read_answer(request(), ids, (10, 20, 30), grammar, tokenizer)
    assert (answer.ranking, answer.status) == (ranking, status)
    assert (answer.missing, answer.repeated, answer.foreign) == counts


def test_read_answer_follows_the_labels_not_the_base_order(grammar, tokenizer):
    answer = read_answer(request(), [9, 8, MARK, A, EOS, PAD], (30, 10, 20), grammar, tokenizer)
    assert answer.ranking == (30, 10, 20)  # A is item 30; the rest in base order
    assert (answer.reasoning, answer.output_tokens) == ("w7 w6", 5)
    assert read_answer(request(), [], (30, 10, 20), grammar, tokenizer).ranking == (10, 20, 30)
    with pytest.raises(ConfigurationError, match="do not stand for the candidates"):
        read_answer(request(), [], (30, 10, 21), grammar, tokenizer)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.sampled_from([PAD, EOS, 7, 8, MARK, A, B, C, D, E, 999]), max_size=14),
    order=st.permutations([10, 20, 30]),
)
def test_read_answer_is_total(ids, order, grammar, tokenizer):
    answer = read_answer(request(), ids, order, grammar, tokenizer)
    assert sorted(answer.ranking) == [10, 20, 30]
    assert answer.status in ("ok", "repaired", "truncated", "unreadable")
    if answer.status == "ok":
        assert answer.missing == answer.repeated == answer.foreign == 0
    if answer.status == "unreadable":
        assert answer.ranking == (10, 20, 30) and answer.missing == 3
    assert 0 <= answer.output_tokens <= len(ids)
