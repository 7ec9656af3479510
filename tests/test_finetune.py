"""Supervised training: the weighted loss by hand, exact resume, LoRA that merges to what was trained."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.adapter import merged, new_rows_alone, with_lora
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.finetune import Collator, Row, finetune


@pytest.fixture
def tokenizer():
    """A real fast tokenizer of single letters: TRL reads more of it than a stand-in could promise."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{chr(ord("a") + n): n + 2 for n in range(26)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )


def tiny(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=28,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


ROWS = [Row(input_ids=[2 + n % 5, 3, 4 + n % 3, 5, 6, 1], parts=[0, 0, 1, 1, 2, 2]) for n in range(12)] + [
    Row(input_ids=[7, 8 + n % 2, 9, 1], parts=[0, 1, 2, 2]) for n in range(4)
]
WEIGHTS = {"reasoning": 0.5, "ranking": 1.0}


def train(model, tokenizer, folder, **changes):
    options = dict(
        part_weights=WEIGHTS,
        steps=6,
        batch_size=8,
        micro_batch_size=4,
        learning_rate=1e-2,
        warmup_share=0.0,
        max_length=16,
        seed=7,
        bf16=False,
        save_steps=2,
    )
    return finetune(model, tokenizer, ROWS, folder, **{**options, **changes})


def test_loss_is_the_weighted_sum_over_parts(tokenizer, tmp_path):
    rows = ROWS[:2]
    model = tiny()
    batch = Collator(0)(
        [
            vars(row) | {"labels": [t if p else -100 for t, p in zip(row.input_ids, row.parts, strict=False)]}
            for row in rows
        ]
    )
    log_probs = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    expected = {1: [], 2: []}
    for r, row in enumerate(rows):
        for t in range(1, len(row.input_ids)):
            if row.parts[t]:
                expected[row.parts[t]].append(-log_probs[r, t - 1, row.input_ids[t]].item())
    total = 0.5 * sum(expected[1]) + 1.0 * sum(expected[2])
    log = finetune(
        tiny(),
        tokenizer,
        rows,
        tmp_path,
        part_weights=WEIGHTS,
        steps=1,
        batch_size=2,
        micro_batch_size=1,
        learning_rate=1e-3,
        warmup_share=0.0,
        max_length=16,
        seed=7,
        bf16=False,
        save_steps=5,
    )
    assert log[0]["loss"] == pytest.approx(total / (len(expected[1]) + len(expected[2])), rel=1e-4)
    assert log[0]["loss/reasoning"] == pytest.approx(sum(expected[1]) / len(expected[1]), rel=1e-4)
    assert log[0]["loss/ranking"] == pytest.approx(sum(expected[2]) / len(expected[2]), rel=1e-4)


def test_a_code_is_a_choice_among_those_that_lead_to_an_item(tokenizer, tmp_path):
    """Codes 10, 11 and then 20, 21, 22; the catalogue lacks (11, 20) and (11, 22)."""
    trie = SidTrie.build([(0, 0), (0, 1), (0, 2), (1, 1)], [(10, 11, 12), (20, 21, 22)], begin_id=9)
    row = Row(input_ids=[3, 10, 21, 4, 11, 21, 1], parts=[0, 1, 1, 1, 1, 1, 1])
    logits = tiny()(input_ids=torch.tensor([row.input_ids])).logits[0]
    among = {1: [10, 11], 2: [20, 21, 22], 4: [10, 11], 5: [21]}
    expected = []
    for place in range(1, 7):
        step = logits[place - 1] - logits[place - 1][among.get(place, range(28))].logsumexp(0)
        expected.append(-step[row.input_ids[place]].item())
    assert expected[4] == pytest.approx(0, abs=1e-6)  # a single way on
    log = finetune(
        tiny(),
        tokenizer,
        [row],
        tmp_path,
        part_weights={"all": 1.0},
        steps=1,
        batch_size=1,
        trie=trie,
        micro_batch_size=1,
        learning_rate=1e-3,
        warmup_share=0.0,
        max_length=16,
        seed=7,
        bf16=False,
        save_steps=5,
    )
    assert log[0]["loss"] == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_a_choice_by_hand(tokenizer, tmp_path):
    choices = {2: {12: 0.5, 11: -1.0}, 3: {10: 0.0, 5: 2.0, 7: -3.0}}
    rows = [
        Row(input_ids=[2, 3, 11, 10, 1], parts=[0, 0, 1, 1, 1], choices=choices, drawn=frozenset([3])),
        Row(input_ids=[4, 5, 6], parts=[0, 1, 1]),
    ]
    expected = []
    for text in rows:
        logits = tiny()(input_ids=torch.tensor([text.input_ids])).logits[0]
        for t in (t for t, part in enumerate(text.parts) if part):
            among = text.choices.get(t, dict.fromkeys(range(28), 0.0))
            weight = 0.2 if t in text.choices else 1.0
            scores = weight * logits[t - 1, list(among)] + torch.tensor(list(among.values()))
            goal = torch.eye(len(among))[list(among).index(text.input_ids[t])]
            if t in text.drawn:
                goal = torch.tensor(list(among.values())).softmax(-1)
            expected.append(-(goal * scores.log_softmax(-1)).sum().item())
    log = finetune(
        tiny(),
        tokenizer,
        rows,
        tmp_path,
        part_weights={"reasoning": 1.0},
        steps=1,
        batch_size=2,
        micro_batch_size=2,
        learning_rate=1e-3,
        warmup_share=0.0,
        max_length=16,
        seed=7,
        bf16=False,
        save_steps=5,
        llm_weight=0.2,
    )
    assert len(expected) == 5 and log[0]["loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_a_killed_run_ends_with_the_same_weights(tokenizer, tmp_path):
    whole = tiny()
    train(whole, tokenizer, tmp_path / "whole")

    def kill(text):
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tokenizer, tmp_path / "killed", say=kill)
    resumed, seen = tiny(seed=99), []  # other weights: what counts is in the checkpoint
    train(resumed, tokenizer, tmp_path / "killed", say=seen.append)
    assert seen and not seen[0].startswith("step 1/"), "the run must go on, not start again"
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_lowers_every_part(tokenizer, tmp_path):
    log = train(tiny(), tokenizer, tmp_path, steps=30, save_steps=100)
    for part in ("loss/reasoning", "loss/ranking"):
        assert log[-1][part] < 0.7 * log[0][part]


@pytest.mark.parametrize("change", [{"max_length": 5}, {"micro_batch_size": 3}])
def test_what_does_not_fit_is_an_error(tokenizer, tmp_path, change):
    with pytest.raises(ConfigurationError, match="do not fit"):
        train(tiny(), tokenizer, tmp_path, **change)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_merges_to_what_was_trained(tokenizer, tmp_path, tied):
    new = [24, 25, 26, 27]
    model = tiny(tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = with_lora(model, 2, new)
    rows = [Row(input_ids=[2, 24, 25, 26, 27, 1], parts=[1] * 6)] * 4
    log = finetune(
        adapted,
        tokenizer,
        rows,
        tmp_path,
        part_weights={"text": 1.0},
        steps=8,
        batch_size=4,
        micro_batch_size=4,
        learning_rate=3e-2,
        warmup_share=0.0,
        max_length=16,
        seed=7,
        bf16=False,
        save_steps=100,
    )
    assert log[-1]["loss"] < log[0]["loss"]
    tokens = torch.tensor([[2, 24, 25, 3, 26, 27]])
    adapted.eval()
    with torch.no_grad():
        trained = adapted(tokens).logits
        plain = merged(adapted)
        assert torch.allclose(plain(tokens).logits, trained, atol=1e-5)
    after = plain.get_input_embeddings().weight
    assert not torch.allclose(after[new], before[new]), "new tokens must train"
    assert torch.equal(after[2:24], before[2:24]), "known tokens must not"


@pytest.mark.parametrize("tied", [True, False])
def test_token_rows_train_alone(tokenizer, tmp_path, tied):
    new = [24, 25, 26, 27]
    model = tiny(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [Row(input_ids=[2, 24, 25, 26, 27, 1], parts=[1] * 6)] * 4
    with new_rows_alone(model, new):
        log = finetune(
            model,
            tokenizer,
            rows,
            tmp_path,
            part_weights={"text": 1.0},
            steps=8,
            batch_size=4,
            micro_batch_size=4,
            learning_rate=3e-2,
            warmup_share=0.0,
            max_length=16,
            seed=7,
            bf16=False,
            save_steps=100,
        )
    assert log[-1]["loss"] < log[0]["loss"] and all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    for name in before:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name][:24], before[name][:24])
            assert not torch.equal(after[name][24:], before[name][24:])
        else:
            assert torch.equal(after[name], before[name]), name
    model(torch.tensor([[2, 3]])).logits.sum().backward()  # the masks are gone
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_rank_zero_trains_the_model_itself():
    model = tiny()
    assert with_lora(model, 0, [3]) is model and merged(model) is model


def test_collator_masks_padding_that_looks_like_a_token():
    plain = {"choice_at": [], "choices": [], "choice_prior": [], "drawn": []}
    batch = Collator(1)(
        [
            {"input_ids": [5, 1], "parts": [0, 1], "labels": [-100, 1], **plain},
            {"input_ids": [5, 6, 7], "parts": [0, 1, 1], "labels": [-100, 6, 7], **plain},
        ]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 7]]
    assert batch["parts"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 1, 1], [5, 6, 7]]
