"""On-policy distillation with a tiny random Llama: advantages of tokens, gradients, and training."""

import itertools
import json

import pytest
import torch
from local_server import serve
from test_dapo import RewardOf, build, first_label, first_round, log_of, loss_of, tiny_model, word_tokenizer

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.llm.dapo import DAPOTrainer
from recbole_gr2.llm.distill import DistillTrainer, EndpointTeacher, LocalTeacher
from recbole_gr2.llm.losses import completion_log_probs
from recbole_gr2.llm.onerec_trainer import RolloutBeamTrainer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def other_model(tokenizer, scale: float = 3.0):
    """A model that prefers other tokens."""
    torch.manual_seed(1)
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.copy_(scale * torch.randn_like(model.lm_head.weight))
    return model


def distill(tokenizer, folder, *, kl=1.0, rewards=None, teacher=None, **changes):
    teacher = teacher or LocalTeacher(other_model(tokenizer), tokenizer, tokenizer)
    return build(
        tokenizer,
        folder,
        trainer_class=DistillTrainer,
        trainer={"teacher": teacher, "kl": kl},
        rewards=rewards or RewardOf(first_label),
        **changes,
    )


def equal_reward(request_id, ranking):
    return 1.0


def test_the_advantage_of_a_token_has_two_parts(tokenizer, tmp_path):
    trainer = distill(tokenizer, tmp_path, kl=0.3)
    sampled = first_round(trainer).batch
    batch = trainer.loss_inputs(sampled)
    teacher, student = (trainer.log_probs_under(model, batch) for model in (trainer.teacher.model, trainer.model))
    chosen = batch["tool_mask"].bool()
    of_answer = torch.tensor([advantage for group in sampled for advantage in group.advantages]).unsqueeze(1)
    expected = of_answer - 0.3 * (student - teacher)
    assert torch.allclose(batch["advantages"][chosen], expected[chosen], atol=1e-5) and of_answer.abs().max() > 0.5
    assert (student - teacher)[chosen].abs().max() > 0.5


def test_the_samples_are_those_of_dapo(tokenizer, tmp_path):
    plain = build(tokenizer, tmp_path / "plain", rewards=RewardOf(first_label), trainer={"max_resample": 0})
    groups, plain_groups = (first_round(t).batch for t in (distill(tokenizer, tmp_path), plain))
    assert [g.completions for g in groups] == [g.completions for g in plain_groups]
    assert [g.advantages for g in groups] == [g.advantages for g in plain_groups]


def test_the_log_has_the_mean_divergence(tokenizer, tmp_path):
    trainer = distill(tokenizer, tmp_path / "run", rewards=RewardOf(equal_reward), steps=1)
    trainer.train()
    names = [json.loads(line)["request_id"] for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    other = distill(tokenizer, tmp_path / "other", rewards=RewardOf(equal_reward))
    other.model.train()
    batch = other.loss_inputs(other.sample_round(list(dict.fromkeys(names))).batch)
    teacher, student = (other.log_probs_under(model, batch) for model in (other.teacher.model, other.model))
    gap = (student - teacher)[batch["tool_mask"].bool()].mean().item()
    assert log_of(trainer)[0]["teacher_kl"] == pytest.approx(gap, abs=1e-5)


def test_the_gradient_is_that_of_the_divergence(tokenizer, tmp_path):
    """The sum over all completions of one prompt, weighted by their probability, against KL(student || teacher)."""
    trainer = distill(tokenizer, tmp_path, rewards=RewardOf(equal_reward), max_reasoning=0)
    batch = trainer.loss_inputs(first_round(trainer).batch)
    row = {name: value[:1] for name, value in batch.items() if value.dim()}
    labels = list(trainer.grammar.label_ids)
    mark = torch.tensor([trainer.grammar.ranking_id])
    end = torch.tensor([trainer.grammar.eos_id])
    every = [torch.cat([mark, torch.tensor(order), end]) for order in itertools.permutations(labels)]
    tensors = {name: row[name].repeat(len(every), 1) for name in ("prompt_ids", "prompt_mask", "label_prior")}
    tensors["completion_ids"] = torch.stack(every)
    tensors["completion_mask"] = torch.ones_like(tensors["completion_ids"])
    student, teacher = (trainer.log_probs_under(m, tensors) for m in (trainer.model, trainer.teacher.model))
    probability = student.sum(-1, keepdim=True).exp()
    assert probability.sum() == pytest.approx(1.0, abs=1e-4)
    live, _ = completion_log_probs(
        trainer.model,
        torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1),
        tensors["completion_ids"].size(1),
        tensors["label_prior"],
        trainer.grammar,
        trainer.temperature,
    )
    weight = trainer.model.lm_head.weight
    ours = torch.autograd.grad((probability * (student - teacher) * live).sum(), weight, retain_graph=True)[0]
    # The divergence of each token given the tokens before it. The probability of these has no gradient.
    before, divergence = (student.cumsum(-1) - student).exp(), 0.0
    for place in range(1, len(labels) + 1):
        choices: dict[tuple, dict[int, int]] = {}  # prefix -> next token -> a completion
        for number, ids in enumerate(every):
            choices.setdefault(tuple(ids[:place].tolist()), {})[ids[place].item()] = number
        for rows in (list(next_tokens.values()) for next_tokens in choices.values()):
            log_p = live[rows, place]
            divergence = divergence + before[rows[0], place] * (log_p.exp() * (log_p - teacher[rows, place])).sum()
    exact = torch.autograd.grad(divergence, weight)[0]
    assert torch.allclose(ours, exact, atol=1e-4) and exact.abs().max() > 1e-2


def test_zero_variance_groups_take_part_in_the_loss(tokenizer, tmp_path):
    trainer = distill(tokenizer, tmp_path, rewards=RewardOf(equal_reward))
    sampled = first_round(trainer)
    batch = trainer.loss_inputs(sampled.batch)
    assert batch["num_items_in_batch"] == batch["tool_mask"].sum() > 0
    metrics = sampled.metrics(trainer.requests)
    assert metrics["refill_rounds"] == 0 and metrics["frac_groups_kept"] == 1.0


@pytest.mark.slow
def test_the_student_approaches_its_teacher(tokenizer, tmp_path):
    soft = LocalTeacher(other_model(tokenizer, scale=0.7), tokenizer, tokenizer)
    trainer = distill(
        tokenizer,
        tmp_path,
        teacher=soft,
        rewards=RewardOf(equal_reward),
        steps=25,
        save_steps=25,
        learning_rate=5e-3,
        num_generations=8,
    )
    trainer.train()
    gaps = [line["teacher_kl"] for line in log_of(trainer)]
    assert len(gaps) == 25 and sum(gaps[-5:]) < 0.75 * sum(gaps[:5])


def test_a_teacher_with_another_vocabulary_is_an_error(tokenizer):
    other = word_tokenizer()
    other.add_tokens(["one_more"])
    with pytest.raises(ConfigurationError, match="they differ"):
        LocalTeacher(other_model(tokenizer), other, tokenizer)


@pytest.fixture
def endpoint(tokenizer, monkeypatch):
    """A server that answers like vLLM with `echo`. It serves `model`. `faults` are its first answers."""
    pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "test")

    def answer(body, fault):
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            values = server.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        logprobs = (
            None
            if fault == "none"
            else {"token_logprobs": [None, *values, -1.0, -1.0]}
            if fault == "more"
            else {"token_logprobs": [None, *values, -1.0], "tokens": [], "text_offset": [], "top_logprobs": None}
        )
        return {
            "id": "1",
            "object": "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "length", "text": "", "logprobs": logprobs}],
        }

    with serve(answer) as server:
        server.model = other_model(tokenizer).eval()
        yield server


def test_a_teacher_behind_an_endpoint(tokenizer, tmp_path, endpoint):
    teacher = EndpointTeacher(endpoint.url, "big", concurrency=3)
    trainer = distill(tokenizer, tmp_path, teacher=teacher, rewards=RewardOf(equal_reward), max_reasoning=4)
    endpoint.faults += [429, 500]
    batch = trainer.loss_inputs(first_round(trainer).batch)
    assert len(endpoint.seen) == 16 + 2 and all(body["echo"] and body["model"] == "big" for body in endpoint.seen)
    traces = trainer.grammar.phases(batch["completion_ids"], torch.full((16,), 4)).reasoning
    model = other_model(tokenizer).eval()
    for row in range(16):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row]])
        with torch.no_grad():
            teacher_log_probs = (
                model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
            )
            student_log_probs = (
                trainer.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
            )
        expected = -(student_log_probs - teacher_log_probs)  # all answers have the same reward
        assert torch.allclose(batch["advantages"][row][traces[row]], expected[traces[row]], atol=1e-4)
        assert (batch["advantages"][row][~traces[row]] == 0).all()
    assert traces.any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_endpoint_that_serves_the_student_teaches_nothing(tokenizer, tmp_path, endpoint, temperature):
    teacher = EndpointTeacher(endpoint.url, "student", concurrency=2)
    equal = {"rewards": RewardOf(equal_reward), "max_reasoning": 4, "temperature": temperature}
    trainer = distill(tokenizer, tmp_path, teacher=teacher, **equal)
    sampled = first_round(trainer).batch
    endpoint.model = trainer.model
    batch = trainer.loss_inputs(sampled)
    assert batch["tool_mask"].sum() > 20
    assert torch.allclose(batch["advantages"], torch.zeros_like(batch["advantages"]), atol=1e-5)
    assert trainer._metrics["train"]["teacher_kl"] == [pytest.approx(0.0, abs=1e-5)]


@pytest.mark.parametrize(
    ("fault", "message"), [("none", "0 log-probabilities"), ("more", "log-probabilities"), (400, "the endpoint failed")]
)
def test_an_endpoint_without_log_probabilities_is_an_error(tokenizer, tmp_path, endpoint, fault, message):
    trainer = distill(tokenizer, tmp_path, teacher=EndpointTeacher(endpoint.url, "big", concurrency=1))
    endpoint.faults += [fault]
    sampled = first_round(trainer).batch
    with pytest.raises(GR2Error, match=message):
        trainer.loss_inputs(sampled)


# --- the KL term of OneRec-Think --------------------------------------------------------------------------------------


class WithReference(RolloutBeamTrainer):
    """A trainer of rankings with the KL term of OneRec-Think."""

    reward_terms = DAPOTrainer.reward_terms

    def __init__(self, *args, reference, kl, **kwargs):
        DAPOTrainer.__init__(self, *args, **kwargs)
        self.beta, self.reference = kl, reference


def test_the_kl_term_is_that_of_grpo(tokenizer, tmp_path):
    """Equal rewards leave only this term. The policy has moved since the samples, so that the ratio is not 1."""
    trainer = build(
        tokenizer,
        tmp_path,
        trainer_class=WithReference,
        trainer={"reference": other_model(tokenizer, scale=0.7), "kl": 0.3},
        rewards=RewardOf(equal_reward),
    )
    batch = trainer.loss_inputs(first_round(trainer).batch)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.4
    weight = trainer.model.lm_head.weight
    (gradient,) = torch.autograd.grad(loss_of(trainer, batch), weight)
    log_probs, _ = completion_log_probs(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].size(1),
        batch["label_prior"],
        trainer.grammar,
        1.0,
    )
    mask = batch["tool_mask"].bool()
    log_ratio = (batch["ref_per_token_logps"] - log_probs)[mask]
    (expected,) = torch.autograd.grad(0.3 * (log_ratio.exp() - log_ratio - 1).sum() / mask.sum(), weight)
    assert torch.allclose(gradient, expected, atol=1e-6) and expected.abs().max() > 1e-3
