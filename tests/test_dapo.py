"""The DAPO trainer with a tiny random Llama: objective, groups, resampling, rollouts, exact resume, learning."""

import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOTrainer

from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.llm.dapo import DAPOTrainer
from recbole_gr2.llm.dapo_config import dapo_config
from recbole_gr2.llm.grammar import FREE, Grammar
from recbole_gr2.llm.losses import completion_logits
from recbole_gr2.llm.rounds import Group, RolloutFile, Round
from recbole_gr2.llm.sampler import RoundSampler
from recbole_gr2.rewards import REWARDS, WeightedRewards
from recbole_gr2.sid.tokens import RANKING, label_tokens
from recbole_gr2.types import Candidate, Request

TESTS = Path(__file__).resolve().parent
K, ITEMS = 4, (10, 20, 30, 40)
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(40))]
GR2 = {"rank_gain": 1.0, "format": {"weight": 0.2, "only_if": "promoted"}}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_tokens([RANKING, *label_tokens(K)])
    return tokenizer


def tiny_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=0.1,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def requests(count: int, target: int = 30) -> dict[str, Request]:
    candidates = tuple(Candidate(item_id=item, score=-rank, rank=rank) for rank, item in enumerate(ITEMS, 1))
    return {
        f"r{i}": Request(
            request_id=f"r{i}",
            user_token=f"u{i}",
            split="train",
            history=(),
            candidates=candidates,
            target=target,
            provider="p",
        )
        for i in range(count)
    }


class RewardOf:
    """A scripted reward of (request id, ranking)."""

    def __init__(self, function):
        self.function = function

    def terms(self, request, answer):
        return {"scripted": self.function(request.request_id, answer.ranking)}

    def total(self, terms):
        return terms["scripted"]


def first_label(request_id, ranking):
    return float(ranking[0])


def build(
    tokenizer,
    folder,
    *,
    steps=2,
    count=12,
    rewards=None,
    max_reasoning=2,
    target=30,
    trainer=None,
    trainer_class=DAPOTrainer,
    **changes,
):
    """A trainer over `count` requests whose prompts have different lengths."""
    by_id = requests(count, target)
    prompts = [
        {
            "request_id": name,
            "prompt_ids": [2 + i % 40, *range(3, 5 + i % 5)],
            "label_items": list(ITEMS),
            "label_prior": [(i + n) % K / 2 for n in range(K)],
        }
        for i, name in enumerate(by_id)
    ]
    settings = {
        "prompts_per_step": 4,
        "num_generations": 4,
        "num_iterations": 2,
        "learning_rate": 1e-2,
        "seed": 5,
        "save_steps": 1,
        "use_cpu": True,
        "mask_truncated": False,  # a random policy rarely ends its reasoning
    } | changes
    return trainer_class(
        tiny_model(tokenizer),
        dapo_config(str(folder), steps=steps, **settings),
        prompts,
        requests=by_id,
        rewards=rewards or WeightedRewards(GR2),
        grammar=Grammar.of(tokenizer, RANKING, label_tokens(K), max_reasoning),
        tokenizer=tokenizer,
        **(trainer or {}),
    )


def rollouts(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "rollouts.jsonl").read_text().splitlines()]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def log_of(trainer) -> list[dict]:
    """The log, one dict per round, without times and without the summary of transformers."""
    return [{k: v for k, v in line.items() if k != "step_time"} for line in trainer.state.log_history if "loss" in line]


def first_round(trainer) -> Round:
    """A round with the first prompts, before any training."""
    trainer.model.train()
    return trainer.sample_round(list(trainer.prompts)[: trainer.prompts_per_step])


def loss_of(trainer, batch) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1
    return trainer.compute_loss(trainer.model, batch)


def test_gradient_checkpointing_changes_no_weight(tokenizer, tmp_path):
    """Up to rounding: without it, completions of a prompt share its keys and values."""
    trained = []
    for checkpointing in (False, True):
        trainer = build(tokenizer, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer.train()
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-4, rtol=1e-3)


# --- what the trainer relies on in TRL -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        (
            "_get_per_token_logps_and_entropies",
            [
                "self",
                "model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "batch_size",
                "compute_entropy",
                "compute_aux_loss",
                "pixel_values",
                "image_grid_thw",
                "num_images",
                "pixel_attention_mask",
                "spatial_shapes",
                "num_tiles",
                "image_sizes",
                "token_type_ids",
                "mm_token_type_ids",
                "image_position_ids",
            ],
        ),
    ],
)
def test_the_private_methods_of_trl_we_override(method, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == parameters


def test_what_the_loss_of_trl_reads(tokenizer, tmp_path):
    source = inspect.getsource(GRPOTrainer._compute_loss)
    ours = {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
    }
    assert all(f'"{key}"' in source for key in ours)
    assert "self._get_per_token_logps_and_entropies(" in source  # which uses the priors of the batch
    trainer = build(tokenizer, tmp_path)
    assert set(trainer.loss_inputs(first_round(trainer).batch)) == {*ours, "label_prior"}


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grounded", [False, True])
def test_loss_and_gradient_against_plain_torch(tokenizer, tmp_path, grounded):
    """DAPO eq. 8 with both clips active, without forced tokens, and the mean over the tokens of the loss."""
    trainer = build(tokenizer, tmp_path, rewards=RewardOf(first_label), trainer={"max_resample": 0})
    if grounded:
        trainer.grammar = replace(
            trainer.grammar, max_reasoning=20, sid_ids=(20, 21), code_ids=(22, 23, 24, 25), levels=2
        )
        for prompt in trainer.prompts.values():
            prompt["prompt_ids"] += [20, 22, 24, 21, 20, 22, 25, 21, 20, 23, 24, 21]  # without labels: no prior
    model = trainer.model
    batch = trainer.loss_inputs(first_round(trainer).batch)
    torch.manual_seed(8)
    shift = torch.empty_like(batch["old_per_token_logps"]).uniform_(-0.6, 0.6)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + shift  # ratios from 0.55 to 1.8
    loss = loss_of(trainer, batch)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    mask = batch["tool_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(ids, attention_mask=attention).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    counts = torch.full((len(ids),), K)
    cited = trainer.grammar.cited(batch["prompt_ids"], batch["label_prior"])
    phases = trainer.grammar.phases(batch["completion_ids"], counts, cited)
    assert not grounded or (phases.copies != FREE).sum() > 10
    allowed, forced = trainer.grammar.mask(phases, logits.size(-1)), phases.only != FREE
    prior = batch["label_prior"].unsqueeze(1).expand(-1, logits.size(1), -1)
    logits = logits.index_add(-1, torch.tensor(trainer.grammar.label_ids), prior)
    if grounded:  # two of the three IDs begin with 22, and all have one prior
        begun = ids[:, batch["prompt_ids"].size(1) - 1 : -1] == 20
        logits = logits.index_add(-1, torch.tensor([22]), begun.unsqueeze(-1) * math.log(2))
    log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    log_probs = log_probs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    ratio = (log_probs - batch["old_per_token_logps"]).exp()
    advantage = batch["advantages"].unsqueeze(1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage)
    reference = -(surrogate * mask).sum() / mask.sum()
    reference.backward()

    assert not (mask * forced).any() and mask.sum() < batch["completion_mask"].sum()
    counted = mask.bool() & (advantage != 0)
    for clipped in ((ratio > 1.28) & (advantage > 0), (ratio < 0.8) & (advantage < 0)):
        assert (clipped & counted).any()
    inside_high = (ratio > 1.2) & (ratio < 1.28) & (advantage > 0) & counted
    assert inside_high.any()  # a symmetric clip of 0.2 would have stopped these
    torch.testing.assert_close(loss, reference)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_groups_without_signal_do_not_change_the_mean(tokenizer, tmp_path):
    """Two of four groups have equal rewards: the loss is that of the two others alone."""
    reward = RewardOf(lambda name, ranking: float(ranking[0]) if name in ("r0", "r2") else 1.0)
    trainer = build(tokenizer, tmp_path, rewards=reward, trainer={"max_resample": 0})
    sampled = first_round(trainer)
    batch = trainer.loss_inputs(sampled.batch)
    rows = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    assert batch["advantages"][4:8].eq(0).all() and batch["advantages"][12:].eq(0).all()
    assert batch["num_items_in_batch"] == batch["tool_mask"][rows].sum()
    half = {key: value[rows] if value.ndim else value for key, value in batch.items()}
    torch.testing.assert_close(loss_of(trainer, batch), loss_of(trainer, half))
    assert sampled.metrics(trainer.requests)["frac_groups_kept"] == 0.5


def test_shared_prompts_give_the_same_logits_and_gradients(tokenizer):
    model = tiny_model(tokenizer).eval()
    torch.manual_seed(1)
    prompts = torch.randint(2, 40, (3, 6))
    prompts[1, :2] = 0  # left padding
    mask = torch.cat([(prompts != 0).long(), torch.ones(3, 5).long()], 1)[[0, 1, 0, 2, 1]]
    ids = torch.cat([prompts[[0, 1, 0, 2, 1]], torch.randint(2, 40, (5, 5))], 1)
    results = []
    for share in (False, True):
        model.zero_grad()
        logits = completion_logits(model, ids, mask, 5, share)
        logits.square().sum().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    (plain, plain_gradient), (shared, shared_gradient) = results
    assert plain.shape == (5, 5, len(tokenizer))
    torch.testing.assert_close(shared, plain)
    for ours, theirs in zip(shared_gradient, plain_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class RecordingTrainer(DAPOTrainer):
    """Record the inputs of the loss, and whether the first ratio is exactly 1."""

    def compute_loss(self, model, inputs, **kwargs):
        self.pieces = [*getattr(self, "pieces", []), inputs]
        assert torch.equal(self.log_probs_under(model, inputs), inputs["old_per_token_logps"])
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("micro", [4, 16])
def test_the_first_ratio_is_exactly_one(tokenizer, tmp_path, micro):
    """For every micro batch, and although the config of the model sets attention dropout. Groups stay together."""
    trainer = build(
        tokenizer, tmp_path, trainer_class=RecordingTrainer, micro_batch_size=micro, steps=1, num_iterations=1
    )
    trainer.train()
    assert [len(piece["prompt_ids"]) for piece in trainer.pieces] == [micro] * (16 // micro)
    for piece in trainer.pieces:
        for group in piece["prompt_ids"].split(4):
            assert (group == group[0]).all()


def test_truncated_completions_are_left_out(tokenizer, tmp_path):
    trainer = build(
        tokenizer,
        tmp_path,
        rewards=RewardOf(first_label),
        trainer={"max_resample": 0},
        max_reasoning=20,
        mask_truncated=True,
    )
    batch = trainer.loss_inputs(first_round(trainer).batch)
    truncated = torch.tensor([trainer.grammar.was_truncated(ids) for ids in batch["completion_ids"].tolist()])
    assert 0 < truncated.sum() < 16
    assert not batch["tool_mask"][truncated].any() and batch["tool_mask"][~truncated].any(1).all()
    assert batch["completion_mask"][truncated].any(1).all()  # the model still reads them


# --- groups and resampling -------------------------------------------------------------------------------------------


def test_resampling_replaces_only_groups_without_signal(tokenizer, tmp_path):
    equal = {"r1", "r3"}
    reward = RewardOf(lambda name, ranking: 1.0 if name in equal else float(ranking[0]))
    plain = first_round(build(tokenizer, tmp_path, rewards=reward, trainer={"max_resample": 0}, max_reasoning=0))
    trainer = build(tokenizer, tmp_path, rewards=reward, trainer={"max_resample": 4}, max_reasoning=0)
    resampled = first_round(trainer)
    kept = {group.request_id for group in resampled.batch}
    assert len(kept) == 4 and {"r0", "r2"} <= kept and not kept & equal and all(g.kept for g in resampled.batch)
    assert {group.request_id for group in resampled.sampled if not group.kept} >= equal
    for position in (0, 2):  # a group with signal keeps its position, token for token
        assert resampled.batch[position].completions == plain.batch[position].completions
        assert resampled.batch[position].advantages == plain.batch[position].advantages
    batch = trainer.loss_inputs(resampled.batch)
    assert batch["completion_ids"][:4].tolist() == plain.batch[0].completions  # all have the same length
    assert batch["advantages"][:4].tolist() == pytest.approx(plain.batch[0].advantages)
    metrics = resampled.metrics(trainer.requests)
    assert metrics["frac_groups_kept"] == 1.0 and metrics["refill_rounds"] >= 1


def test_a_run_records_groups_that_are_not_kept(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, rewards=RewardOf(some_are_equal), steps=1)
    trainer.train()
    (line,), lines = log_of(trainer), rollouts(tmp_path)
    assert line["frac_groups_kept"] == 1.0 and line["refill_rounds"] >= 1
    kept = {entry["request_id"] for entry in lines if entry["kept"]}
    assert len(kept) == 4 and not any(int(name[1:]) % 2 for name in kept)
    assert {int(entry["request_id"][1:]) % 2 for entry in lines if not entry["kept"]} >= {1}


def test_advantages_are_of_the_group(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, steps=1, rewards=RewardOf(lambda name, r: int(name[1:]) * 100 + r[0]))
    trainer.train()
    names = list(dict.fromkeys(line["request_id"] for line in rollouts(tmp_path)))
    assert len(names) >= 4
    for name in names:
        lines = [line for line in rollouts(tmp_path) if line["request_id"] == name]
        rewards = torch.tensor([float(line["reward"]) for line in lines])
        if rewards.std() > 0:
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert [line["advantage"] for line in lines] == pytest.approx(expected.tolist(), abs=1e-5)
        assert sum(line["advantage"] for line in lines) == pytest.approx(0, abs=1e-5)


def test_a_group_without_a_reward_has_no_signal(tokenizer, tmp_path):
    options = {"target": 99, "trainer": {"max_resample": 0, "max_empty_rounds": 3}}
    trainer = build(tokenizer, tmp_path / "round", **options)
    batch = trainer.loss_inputs(first_round(trainer).batch)
    assert batch["advantages"].eq(0).all() and batch["num_items_in_batch"] == 0
    trainer = build(tokenizer, tmp_path / "run", steps=1, **options)
    trainer.train()
    (line,) = log_of(trainer)
    assert "reward" not in line and "reward/unchanged" in line


def test_rounds_without_signal_stop_the_run(tokenizer, tmp_path):
    options = {"steps": 4, "rewards": RewardOf(lambda *_: 1.0), "trainer": {"max_empty_rounds": 3}}
    trainer = build(tokenizer, tmp_path, **options)
    with pytest.raises(QualityCheckError, match="3 rounds in a row"):
        trainer.train()
    lines = rollouts(tmp_path)
    assert {line["step"] for line in lines} == {0, 2, 4} and not any(line["kept"] for line in lines)
    assert {line["attempt"] for line in lines} == {0, 1, 2}
    again = build(tokenizer, tmp_path, **options)
    with pytest.raises(QualityCheckError, match="3 rounds in a row"):  # the two rounds before the checkpoint count
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rollouts(tmp_path) == lines


def group_of(verified: list[float | None], masks: list[list[int]] | None = None, kept: bool = False) -> Group:
    size = len(verified)
    masks = masks or [[1]] * size
    return Group("r0", 0, [[1]] * size, masks, [], [{}] * size, [0.2, 0.1], verified, kept)


def test_length_alone_is_no_signal():
    """Copies of the input differ in reward by the overlong penalty, but they do not teach a ranking."""
    assert not group_of([0.2, 0.2]).has_signal and group_of([0.2, 0.2]).advantages == [0.0, 0.0]
    assert group_of([0.2, 0.0]).has_signal and group_of([0.2, 0.0]).advantages[0] > 0


def test_a_group_needs_rewards_and_tokens():
    assert not group_of([0.2, None]).has_signal
    assert not group_of([0.2, 0.0], masks=[[0], [0]]).has_signal


def test_a_rollout_file_drops_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "run" / "rollouts.jsonl"
    file = RolloutFile(path, 0, write=True)
    for step, kept in ((0, True), (2, False), (4, False)):
        file.add(step, Round([], [group_of([0.2, 0.2], kept=kept)], 0), {})
    assert file.empty_rounds == 2 and path.read_text() == ""
    lines = [json.dumps({"step": step, "kept": step == 0}) + "\n" for step in (0, 2, 4)]
    path.write_text("".join(lines) + '{"step": 6, "ke')
    assert RolloutFile(path, 4, write=False).empty_rounds == 1
    assert len(path.read_text().splitlines()) == 4  # other processes do not write
    assert RolloutFile(path, 6, write=True).empty_rounds == 2 and path.read_text() == "".join(lines)
    assert RolloutFile(path, 2, write=True).empty_rounds == 0 and path.read_text() == lines[0]


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_counts_rounds(tmp_path):
    args = dapo_config(
        str(tmp_path),
        steps=10,
        prompts_per_step=8,
        num_generations=4,
        num_iterations=3,
        learning_rate=1e-6,
        seed=1,
        save_steps=5,
        minibatches=2,
        micro_batch_size=5,  # the largest divisor of a minibatch of 16 is 4
        warmup_steps=1,
        use_cpu=True,
    )
    assert args.generation_batch_size == 32
    assert (args.max_steps, args.save_steps, args.logging_steps, args.warmup_steps) == (60, 30, 6, 6)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation) == (4, 4, 8)
    assert (args.epsilon, args.epsilon_high, args.loss_type, args.beta) == (0.2, 0.28, "dapo", 0.0)


@pytest.mark.parametrize("minibatches", [3, 16])
def test_config_refuses_what_does_not_divide(minibatches):
    with pytest.raises(ConfigurationError, match="do not divide"):
        dapo_config(
            "x",
            steps=1,
            prompts_per_step=2,
            num_generations=4,
            num_iterations=2,
            learning_rate=1e-6,
            seed=1,
            save_steps=1,
            minibatches=minibatches,
            use_cpu=True,
        )


def test_trainer_refuses_an_inexact_run(tokenizer, tmp_path):
    args = dapo_config(
        str(tmp_path),
        steps=2,
        prompts_per_step=4,
        num_generations=2,
        num_iterations=2,
        learning_rate=1e-3,
        seed=1,
        save_steps=1,
        use_cpu=True,
    )
    args.save_steps, args.beta = 3, 0.1
    prompts = [{"request_id": name, "prompt_ids": [2], "label_items": list(ITEMS)} for name in ("r0", "r0", "r9")]
    with pytest.raises(ConfigurationError) as error:
        DAPOTrainer(
            tiny_model(tokenizer),
            args,
            prompts,
            requests=requests(4),
            rewards=WeightedRewards(GR2),
            grammar=Grammar.of(tokenizer, RANKING, label_tokens(K), 2),
            tokenizer=tokenizer,
        )
    for part in ("save_steps is 3", "beta is 0.1", "1 request ids appear twice", "2 requests are fewer", "e.g. r9"):
        assert part in str(error.value)


def test_the_order_of_prompts():
    sampler = RoundSampler(size=5, rounds=5, prompts=2, generations=3, repeats=2, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 5 * 2 * 3 * 2 and order == list(sampler)
    rounds = [order[start : start + 12] for start in range(0, 60, 12)]
    for rows in rounds:
        assert rows[:6] == rows[6:] and rows[0:3] == [rows[0]] * 3 and rows[3:6] == [rows[3]] * 3
    assert len({*rounds[0], *rounds[1]}) == 4 and len({*rounds[2], *rounds[3]}) == 4  # an epoch uses no prompt twice
    assert rounds[0] + rounds[1] != rounds[2] + rounds[3]


# --- whole runs ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The run ends at once."""


@pytest.mark.slow
def test_resume_is_exact(tokenizer, tmp_path):
    """A run of 4 rounds equals one that is killed in the third and resumed. The second epoch begins in the fourth."""
    options = {"steps": 4, "minibatches": 2, "micro_batch_size": 4, "max_reasoning": 2}
    whole = build(tokenizer, tmp_path / "whole", **options)
    whole.train()

    half = build(tokenizer, tmp_path / "half", **options)
    step_of = half.training_step

    def killed_in_round_three(*args, **kwargs):
        if half.state.global_step == 10:
            raise Killed
        return step_of(*args, **kwargs)

    half.training_step = killed_in_round_three
    with pytest.raises(Killed):
        half.train()
    assert {line["step"] for line in rollouts(tmp_path / "half")} == {0, 4, 8}  # ahead of the checkpoint at 8
    torch.manual_seed(999)  # another process has another random state
    resumed = build(tokenizer, tmp_path / "half", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))

    assert rollouts(tmp_path / "half") == rollouts(tmp_path / "whole")
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any(not torch.equal(value, expected[name]) for name, value in tiny_model(tokenizer).state_dict().items())

    assert len(log_of(whole)) == 4 and log_of(resumed) == log_of(whole)
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-16"]


def test_micro_batches_do_not_change_the_weights(tokenizer, tmp_path):
    runs = []
    for name, micro in (("one", None), ("four", 4)):
        trainer = build(tokenizer, tmp_path / name, steps=1, micro_batch_size=micro)
        trainer.train()
        runs.append(weights(trainer))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_learns_to_put_the_target_first(tokenizer, tmp_path):
    """The target always has label C. A random policy puts it at rank 2.5 on average."""
    trainer = build(
        tokenizer, tmp_path, steps=14, prompts_per_step=8, num_generations=8, save_steps=14, max_reasoning=1
    )
    trainer.train()
    log = log_of(trainer)
    assert len(log) == 14
    first, last = log[0], log[-1]
    assert first["reward/rank_gain"] < 0.25 and last["reward/rank_gain"] > 0.4  # 0.5 is perfect
    assert last["reward/ndcg"] > 0.85
    assert max(line["clip_ratio/high_mean"] for line in log) > 0  # two passes: some ratios are clipped
    expected = {"reward", "unchanged", "truncated", "frac_groups_kept", "refill_rounds", "entropy"}
    expected |= {"clip_ratio/low_mean", "clip_ratio/high_mean"}
    expected |= {f"reward/{name}" for name in REWARDS}
    assert expected <= set(first)


# --- several processes -----------------------------------------------------------------------------------------------


def some_are_equal(request_id, ranking):
    """Half of the requests have equal rewards, so that every round is resampled."""
    return 0.0 if int(request_id[1:]) % 2 else float(ranking[0])


def shared_run(folder, *, processes=1, steps=3, resume=False):
    """A run whose rounds `processes` share. Each process calls this."""
    trainer = build(
        word_tokenizer(),
        folder,
        steps=steps,
        count=24,
        rewards=RewardOf(some_are_equal),
        minibatches=2,
        micro_batch_size=2,
        processes=processes,
    )
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-8") if resume else None)
    return trainer


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path):
    """Two processes that stop after two rounds and resume, against one process that does not stop."""
    worker, two = tmp_path / "worker.py", tmp_path / "two"
    worker.write_text(
        f"import sys, torch\nsys.path[:0] = {[str(TESTS), str(TESTS.parent)]}\nimport test_dapo\n"
        "test_dapo.shared_run(sys.argv[1], processes=2, steps=2)\n"
        "trainer = test_dapo.shared_run(sys.argv[1], processes=2, resume=True)\n"
        "assert trainer.accelerator.num_processes == 2\n"
        "torch.save((test_dapo.weights(trainer), trainer.state.log_history), "
        "f'{sys.argv[1]}/result-{trainer.accelerator.process_index}.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (weights_0, log), (weights_1, _) = (torch.load(two / f"result-{i}.pt", weights_only=False) for i in (0, 1))
    alone = shared_run(tmp_path / "one")
    mine, theirs = rollouts(tmp_path / "one"), rollouts(two)
    assert [line.pop("advantage") for line in mine] == pytest.approx([line.pop("advantage") for line in theirs])
    assert mine == theirs
    assert {line["attempt"] for line in mine} == {0, 1, 2}  # both processes draw the same further prompts
    for name, value in weights(alone).items():
        assert torch.equal(weights_0[name], weights_1[name])
        assert torch.allclose(value, weights_0[name], atol=2e-5)
    for name in ("reward", "frac_groups_kept", "refill_rounds", "loss", "grad_norm", "completions/mean_length"):
        ours, their = ([line[name] for line in lines if name in line] for lines in (alone.state.log_history, log))
        assert ours == pytest.approx(their, abs=2e-4) and len(ours) == 3


def test_processes_have_whole_groups(tmp_path):
    shared = {
        "steps": 1,
        "num_generations": 4,
        "num_iterations": 1,
        "learning_rate": 1e-3,
        "seed": 1,
        "save_steps": 1,
        "use_cpu": True,
    }
    with pytest.raises(ConfigurationError, match="3 prompts x 4 completions .* on each of 2 processes"):
        dapo_config(str(tmp_path), prompts_per_step=3, processes=2, **shared)
    args = dapo_config(str(tmp_path), prompts_per_step=4, processes=2, micro_batch_size=32, **shared)
    assert (args.per_device_train_batch_size, args.steps_per_generation) == (8, 1)
