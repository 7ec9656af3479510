"""On-policy distillation on a tiny random Llama: what a token is paid, and that the student nears its teacher."""

import itertools

import pytest
import torch
from local_server import serve
from test_dapo import RewardOf, build, first_label, one_round, tiny_model, word_tokenizer

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.llm.distill import DistillTrainer, EndpointTeacher, LocalTeacher


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def other_model(tokenizer, scale: float = 3.0):
    """A model that is sure of other tokens."""
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


def same_worth(request_id, ranking):
    return 1.0


def test_a_token_is_paid_its_answer_and_its_teacher(tokenizer, tmp_path):
    trainer = distill(tokenizer, tmp_path, kl=0.3)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(one_round(trainer))
    teacher, student = (trainer.log_probs_under(model, batch) for model in (trainer.teacher.model, trainer.model))
    alone = build(tokenizer, tmp_path / "alone", rewards=RewardOf(first_label))
    alone.model.eval()
    plain = alone._generate_and_score_completions(one_round(alone))
    assert torch.equal(plain["completion_ids"], batch["completion_ids"])
    chosen = batch["tool_mask"].bool()
    by_hand = plain["advantages"].unsqueeze(1) - 0.3 * (student - teacher)
    assert torch.allclose(batch["advantages"][chosen], by_hand[chosen], atol=1e-5)
    assert (student - teacher)[chosen].abs().max() > 0.5
    gap = (student - teacher)[chosen].mean().item()
    assert trainer._metrics["train"]["teacher_kl"] == [pytest.approx(gap, abs=1e-5)]


def test_the_gradient_is_that_of_the_divergence(tokenizer, tmp_path):
    """Over all completions of one prompt, weighted by their probability, against KL(student || teacher) itself."""
    trainer = distill(tokenizer, tmp_path, rewards=RewardOf(same_worth), max_reasoning=0)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(one_round(trainer))
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
    trainer._label_prior = tensors["label_prior"]
    live = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1),
        tensors["completion_ids"].size(1),
    )[0]
    weight = trainer.model.lm_head.weight
    ours = torch.autograd.grad((probability * (student - teacher) * live).sum(), weight, retain_graph=True)[0]
    # The divergence of each token given what stands before it; how often that stands there is not differentiated.
    before, divergence = (student.cumsum(-1) - student).exp(), 0.0
    for place in range(1, len(labels) + 1):
        choices: dict[tuple, dict[int, int]] = {}  # what stands before -> next token -> a completion that goes on so
        for number, ids in enumerate(every):
            choices.setdefault(tuple(ids[:place].tolist()), {})[ids[place].item()] = number
        for rows in (list(next_tokens.values()) for next_tokens in choices.values()):
            own = live[rows, place]
            divergence = divergence + before[rows[0], place] * (own.exp() * (own - teacher[rows, place])).sum()
    exact = torch.autograd.grad(divergence, weight)[0]
    assert torch.allclose(ours, exact, atol=1e-4) and exact.abs().max() > 1e-2


def test_groups_of_one_worth_stay_and_count(tokenizer, tmp_path):
    trainer = distill(tokenizer, tmp_path, rewards=RewardOf(same_worth))
    batch = trainer._generate_and_score_completions(one_round(trainer))
    assert batch["num_items_in_batch"] == batch["tool_mask"].sum() > 0
    assert trainer._metrics["train"]["refill_rounds"] == [0] and trainer._metrics["train"]["frac_groups_kept"] == [1.0]


def test_the_student_comes_nearer_to_its_teacher(tokenizer, tmp_path):
    soft = LocalTeacher(other_model(tokenizer, scale=0.7), tokenizer, tokenizer)
    trainer = distill(
        tokenizer,
        tmp_path,
        teacher=soft,
        rewards=RewardOf(same_worth),
        steps=25,
        save_steps=25,
        learning_rate=5e-3,
        num_generations=8,
    )
    trainer.train()
    gaps = [line["teacher_kl"] for line in trainer.state.log_history if "teacher_kl" in line]
    assert len(gaps) == 25 and sum(gaps[-5:]) < 0.75 * sum(gaps[:5])


def test_a_teacher_of_other_tokens_is_refused(tokenizer):
    other = word_tokenizer()
    other.add_tokens(["one_more"])
    with pytest.raises(ConfigurationError, match="they differ"):
        LocalTeacher(other_model(tokenizer), other, tokenizer)


@pytest.fixture
def endpoint(tokenizer, monkeypatch):
    """A server that answers as vLLM does, with `echo`; `faults` are what it does first."""
    pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    model = other_model(tokenizer).eval()

    def answer(asked, fault):
        ids = torch.tensor([asked["prompt"]])
        with torch.no_grad():
            found = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        given = (
            None
            if fault == "none"
            else {"token_logprobs": [None, *found, -1.0], "tokens": [], "text_offset": [], "top_logprobs": None}
        )
        return {
            "id": "1",
            "object": "text_completion",
            "created": 1,
            "model": asked["model"],
            "choices": [{"index": 0, "finish_reason": "length", "text": "", "logprobs": given}],
        }

    with serve(answer) as server:
        yield server


def test_a_teacher_behind_an_endpoint(tokenizer, tmp_path, endpoint):
    teacher = EndpointTeacher(endpoint.url, "big", concurrency=3)
    trainer = distill(tokenizer, tmp_path, teacher=teacher, rewards=RewardOf(same_worth), max_reasoning=4)
    trainer.model.eval()
    endpoint.faults += [429, 500]
    batch = trainer._generate_and_score_completions(one_round(trainer))
    assert len(endpoint.seen) == 16 + 2 and all(asked["echo"] and asked["model"] == "big" for asked in endpoint.seen)
    traces = trainer.grammar.phases(batch["completion_ids"], torch.full((16,), 4)).reasoning
    model = other_model(tokenizer).eval()
    for row in range(16):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row]])
        with torch.no_grad():
            said = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
        paid = -(batch["old_per_token_logps"][row] - said)  # all answers are worth the same
        assert torch.allclose(batch["advantages"][row][traces[row]], paid[traces[row]], atol=1e-4)
        assert (batch["advantages"][row][~traces[row]] == 0).all()
    assert traces.any()


@pytest.mark.parametrize(("fault", "message"), [("none", "0 log-probabilities"), (400, "the endpoint failed")])
def test_an_endpoint_that_cannot_teach(tokenizer, tmp_path, endpoint, fault, message):
    trainer = distill(tokenizer, tmp_path, teacher=EndpointTeacher(endpoint.url, "big", concurrency=1))
    endpoint.faults += [fault]
    with pytest.raises(GR2Error, match=message):
        trainer._generate_and_score_completions(one_round(trainer))
