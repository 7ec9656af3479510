"""The engines that generate: one seam for all callers, and vLLM gives what transformers gives."""

import importlib.util
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_dapo
import test_teachers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import recbole_gr2
from recbole_gr2.errors import ConfigurationError, DependencyError, QualityCheckError
from recbole_gr2.llm import generation, vllm_engine
from recbole_gr2.llm.adapter import with_lora
from recbole_gr2.llm.generation import generate_completions, generate_rankings
from recbole_gr2.llm.grammar import Grammar, GrammarProcessor
from recbole_gr2.policy import engine, engine_value
from recbole_gr2.teachers.registry import build_teacher

language_model = test_teachers.language_model  # a fixture
PACKAGE = Path(recbole_gr2.__file__).parent
BEGIN, END, MARK, LABELS, EOS, PAD = 20, 21, 50, (51, 52, 53, 54, 55), 1, 0
CODES = tuple(range(22, 30))
PLAIN = Grammar(MARK, LABELS, EOS, PAD, 6)
GROUNDED = Grammar(MARK, LABELS, EOS, PAD, 12, sid_ids=(BEGIN, END), code_ids=CODES, levels=2, llm_weight=0.6)
PROMPTS = [
    [2, BEGIN, 22, 26, END, 51, BEGIN, 22, 27, END, 52, BEGIN, 24, 25, END, 53, 7],
    [8, BEGIN, 23, 25, END, 51, BEGIN, 22, 25, END, 52],
    [10, 11, BEGIN, 28, 29, END, 12, BEGIN, 24, 29, END, 51, 3],
]
PRIORS = [[0.0, 1.0, -1.0], [0.5, 0.2], [0.0]]


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A tiny model whose width of a head vLLM supports on a CPU."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 56,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


# --- without vLLM ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_without_the_package_every_caller_stops(no_vllm, tmp_path):
    """Nothing falls back to transformers."""
    with pytest.raises(DependencyError) as error:
        generate_rankings(llama(), PROMPTS, PRIORS, grammar=PLAIN, engine="vllm")
    assert (error.value.what, error.value.where) == ("the vllm package is not installed", "llm_engine")
    assert error.value.why and "recbole-gr2[vllm]" in error.value.do and "transformers" in error.value.do
    with pytest.raises(DependencyError):
        engine({"llm_engine": "vllm"})
    trainer = test_dapo.build(test_dapo.word_tokenizer(), tmp_path, trainer={"engine": "vllm"})
    with pytest.raises(DependencyError):
        test_dapo.first_round(trainer)


def test_several_processes_cannot_use_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_engine, "WORLD_SIZE", 2)
    with pytest.raises(ConfigurationError, match="in 2 processes"):
        engine({"llm_engine": "vllm"})


def test_only_another_engine_than_the_default_enters_a_key():
    assert engine_value({"llm_engine": "transformers"}) == {}
    assert engine_value({"llm_engine": "vllm"}) == {"llm_engine": "vllm"}


def test_one_module_reads_the_setting_and_one_knows_vllm():
    sources = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    assert len(sources) > 150

    def files(pattern: str) -> set[str]:
        return {name for name, source in sources.items() if re.search(pattern, source)}

    assert files(r'\["llm_engine"\]') == {"policy.py"}
    assert files(r"(?m)^\s*(from|import) vllm\b") == {"llm/vllm_engine.py"}
    assert files(r"import .*\bvllm_engine|vllm_engine import") == {"llm/generation.py"}


def test_trainers_and_teachers_pass_their_engine(monkeypatch, tmp_path, language_model):
    used = []

    @contextmanager
    def recording(*args):
        used.append(args)
        with generation.ENGINES["transformers"](*args) as decode:
            yield decode

    monkeypatch.setitem(generation.ENGINES, "recording", recording)
    trainer = test_dapo.build(test_dapo.word_tokenizer(), tmp_path, trainer={"engine": "recording"})
    expected = test_dapo.first_round(test_dapo.build(test_dapo.word_tokenizer(), tmp_path))
    got = test_dapo.first_round(trainer)
    assert [group.completions for group in got.batch] == [group.completions for group in expected.batch]
    assert used
    used.clear()
    model = SimpleNamespace(**{**vars(language_model), "engine": "recording"})
    teacher = build_teacher(
        "local_llm",
        catalog=test_teachers.CATALOG,
        settings=test_teachers.SETTINGS,
        seed=1,
        language_model=lambda: model,
    )
    teacher.argue([test_teachers.request_of()], targeted=False, attempt=0)
    assert len(used) == 1


def test_rows_of_different_lengths_are_restricted_alike():
    """vLLM passes any completions in any order; transformers all of them, with one length."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in PROMPTS], batch_first=True)
    prior = torch.tensor([[*row, *[-torch.inf] * (5 - len(row))] for row in PRIORS])
    walks = [[7, BEGIN, 22], [9], []]
    logits = torch.randn(3, 56, generator=torch.Generator().manual_seed(0))
    whole = GrammarProcessor(GROUNDED, ids, prior, 0.7)
    order = [2, 0, 1]
    got = whole.restrict(
        logits[order],
        torch.tensor([[*walks[row], *[PAD] * (3 - len(walks[row]))] for row in order]),
        torch.tensor([len(walks[row]) for row in order]),
        torch.tensor(order),
    )
    for place, row in enumerate(order):
        alone = GrammarProcessor(GROUNDED, ids[row : row + 1], prior[row : row + 1], 0.7)
        text = torch.cat([ids[row], torch.tensor(walks[row], dtype=torch.long)]).unsqueeze(0)
        torch.testing.assert_close(got[place], alone(text, logits[row : row + 1])[0], rtol=0, atol=0)


# --- with vLLM -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm():
    pytest.importorskip("vllm")


def with_vllm(test):
    """Mark a test that needs vLLM, whose import warns of its own dependencies."""
    for mark in (pytest.mark.usefixtures("vllm"), pytest.mark.slow, pytest.mark.filterwarnings("ignore")):
        test = mark(test)
    return test


@with_vllm
@pytest.mark.parametrize("grammar", [PLAIN, GROUNDED], ids=["plain", "grounded"])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_completions_and_log_probabilities_agree(monkeypatch, grammar, seed):
    """The second seed has other weights: those of the engine are replaced."""
    seen = {}
    restrict = GrammarProcessor.restrict

    def recording(self, scores, written, lengths, rows):
        result = restrict(self, scores, written, lengths, rows)
        for row, length, log_probs in zip(rows.tolist(), lengths.tolist(), result.log_softmax(-1), strict=True):
            seen[row, length] = log_probs.max().item()  # of the chosen token
        return result

    monkeypatch.setattr(GrammarProcessor, "restrict", recording)
    expected = generate_completions(llama(seed), PROMPTS, PRIORS, grammar=grammar)
    log_probs = dict(seen)
    seen.clear()
    got = generate_completions(llama(seed), PROMPTS, PRIORS, grammar=grammar, engine="vllm")
    assert [completion.ids for completion in got] == [completion.ids for completion in expected]
    assert len(seen) == sum(len(completion.ids) for completion in got)
    assert max(abs(log_probs[place] - log_prob) for place, log_prob in seen.items()) < 1e-3
    assert min(seen.values()) < -0.1  # not all tokens are forced
    for one, other in zip(got, expected, strict=True):
        assert one.first_choice == pytest.approx(other.first_choice, abs=1e-3)
    if grammar is GROUNDED:
        assert any(BEGIN in completion.ids for completion in generate(llama(seed), "vllm"))


def generate(model, name: str, prompts=PROMPTS, priors=PRIORS):
    """Samples of a model that often begins a semantic ID."""
    return generate_completions(
        model, prompts, priors, grammar=GROUNDED, num_generations=4, temperature=1.5, seed=7, engine=name
    )


@with_vllm
def test_samples_are_those_of_transformers_and_do_not_depend_on_their_batch():
    model = llama(3)
    samples = [completion.ids for completion in generate(model, "vllm")]
    assert samples == [completion.ids for completion in generate(model, "transformers")]
    assert samples == [completion.ids for completion in generate(model, "vllm")]
    assert samples[4:8] == [completion.ids for completion in generate(model, "vllm", PROMPTS[1:2], PRIORS[1:2])]
    assert len({tuple(ids) for ids in samples}) > 6


@with_vllm
def test_vllm_uses_the_weights_of_an_adapter():
    model = with_lora(llama(4), 2, [54, 55])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = generate_rankings(llama(4), PROMPTS, PRIORS, grammar=PLAIN)
    adapted = generate_rankings(model, PROMPTS, PRIORS, grammar=PLAIN)
    assert adapted != plain
    assert generate_rankings(model, PROMPTS, PRIORS, grammar=PLAIN, engine="vllm") == adapted
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@with_vllm
def test_rollouts_follow_the_weights_during_training(monkeypatch, tmp_path):
    tokenizer = test_dapo.word_tokenizer()
    monkeypatch.setattr(test_dapo, "tiny_model", lambda tokenizer: llama(5, vocab_size=len(tokenizer)))
    rollouts = {}
    for name in ("transformers", "vllm"):
        trainer = test_dapo.build(tokenizer, tmp_path / name, steps=4, trainer={"engine": name})
        trainer.train()
        rollouts[name] = [(line["reasoning"], line["ranking"]) for line in test_dapo.rollouts(tmp_path / name)]
    assert rollouts["vllm"] == rollouts["transformers"]


@with_vllm
def test_wrong_weights_in_vllm_are_an_error(monkeypatch):
    wrong = llama(9).state_dict()
    monkeypatch.setattr(LlamaForCausalLM, "state_dict", lambda self: wrong)
    with pytest.raises(QualityCheckError, match="different probabilities"):
        generate_rankings(llama(0), PROMPTS, PRIORS, grammar=PLAIN, engine="vllm")


@with_vllm
def test_a_model_that_vllm_cannot_run_is_an_error():
    with pytest.raises(ConfigurationError, match="vLLM cannot run"):
        generate_rankings(llama(hidden_size=32), PROMPTS, PRIORS, grammar=PLAIN, engine="vllm")
