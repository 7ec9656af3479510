"""Score all candidates of a list in one forward pass, and train a language model to do so.

The score of a candidate is the logit of its label after the prompt and the ranking mark, as in the verbaliser of
LlamaRec (arXiv 2311.02089). These are the logits by which `generation` chooses the first label of an answer without
reasoning. Nothing is generated, so that the cost of a list is that of reading its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from recbole_gr2.batching import by_length
from recbole_gr2.distributed import WORLD_SIZE
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.checkpoints import CompleteCheckpoints
from recbole_gr2.llm.inputs import attention_bias, bf16_autocast, check_window, common_length, evaluating, padded
from recbole_gr2.llm.kv_cache import Prefix
from recbole_gr2.llm.sampler import LengthSampler
from recbole_gr2.llm.sharding import trainable
from recbole_gr2.llm.train import (
    FiniteLoss,
    ProgressLines,
    Training,
    length_sampler,
    through,
    train_from_checkpoint,
    training_options,
)
from recbole_gr2.progress import progress

Batch = Mapping[str, torch.Tensor]
PADDING = -1  # segment of padding


@dataclass(frozen=True, kw_only=True)
class ListInput:
    """A list as the language model reads it.

    Attributes:
        input_ids: token ids, (T,).
        places: position whose output gives the score of each candidate, (K,).
        tokens: token whose logit at this position is the score, (K,).
        prior: log-prior of each candidate, (K,); zeros without a prior.
        relevance: relevance of each candidate, (K,), for training; () if it is unknown.
        segments: candidate that a position belongs to, from 1, (T,), 0 for the context that all candidates see; () for
            causal attention over all positions.
        positions: position ids, (T,), with `segments`. Each candidate has those that follow the context.
        items: item that a position stands for, (T,), 0 for a position of text; () if all positions are text, see
            `recbole_gr2.llm.item_vectors`.
        slots: position of each candidate, (K,), with `items`.
        features: features of each candidate, (K, F), with `items`.
    """

    input_ids: Sequence[int]
    places: Sequence[int]
    tokens: Sequence[int]
    prior: Sequence[float]
    relevance: Sequence[float] = ()
    segments: Sequence[int] = ()
    positions: Sequence[int] = ()
    items: Sequence[int] = ()
    slots: Sequence[int] = ()
    features: Sequence[Sequence[float]] = ()


class ListCollator:
    """Pad lists on the right to one batch. Under causal attention no token sees the padding, so no mask is needed.

    Args:
        pad_id: id of the padding token.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, lists: Sequence[ListInput]) -> dict[str, torch.Tensor]:
        """Return tensors: input_ids, segments, positions and items (B, T), features (B, K, F), all others (B, K).

        The prior of padding is -inf. What the lists do not have is left out.
        """
        batch = {
            "input_ids": padded([each.input_ids for each in lists], self.pad_id),
            "places": padded([each.places for each in lists], 0),
            "tokens": padded([each.tokens for each in lists], 0),
            "prior": padded([each.prior for each in lists], -torch.inf),
        }
        if lists[0].relevance:
            batch["relevance"] = padded([[float(value) for value in each.relevance] for each in lists], 0.0)
        if lists[0].segments:
            batch["segments"] = padded([each.segments for each in lists], PADDING)
            batch["positions"] = padded([each.positions for each in lists], 0)
        if lists[0].items:
            batch["items"] = padded([each.items for each in lists], 0)
            batch["slots"] = padded([each.slots for each in lists], 0)
            rows = [torch.tensor(each.features, dtype=torch.float32) for each in lists]
            batch["features"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


def shared_length(lists: Sequence[ListInput]) -> int:
    """Return the number of first tokens that are equal in all lists: text of the context, before any score."""
    longest = min(min(each.places) for each in lists)
    length = common_length([each.input_ids[:longest] for each in lists])
    others = [part[:length] for each in lists for part in (each.items, each.segments)]
    return min((place for part in others for place, value in enumerate(part) if value), default=length)


def list_scores(model: Any, batch: Batch, llm_weight: float, prefix: Prefix | None = None) -> torch.Tensor:
    """Return the score of each candidate, llm_weight * logit + prior, (B, K) float32; -inf for padding.

    Only the logits of the scored tokens at the scored positions are computed.

    Args:
        model: a causal language model. If the lists have items, its attribute `item_inputs` is an `ItemInputs`.
        batch: the lists, see `ListCollator`.
        llm_weight: power of the model's probability.
        prefix: the first tokens of all lists, which are not read again.
    """
    start = prefix.length if prefix else 0
    inputs: dict[str, Any] = {"use_cache": prefix is not None}
    if "items" in batch:
        inputs["inputs_embeds"] = model.item_inputs(batch, model.get_input_embeddings())[:, start:]
    else:
        inputs["input_ids"] = batch["input_ids"][:, start:]
    if "segments" in batch:
        inputs["attention_mask"] = attention_bias(visible(batch["segments"])[:, start:], model)
        inputs["position_ids"] = batch["positions"][:, start:]
    if prefix:
        inputs["past_key_values"] = prefix.cache(model, len(batch["places"]))
    hidden = model.get_decoder()(**inputs).last_hidden_state
    places, tokens = (batch["places"] - start).clamp(min=0), batch["tokens"]  # those of padding are 0
    head, hidden = model.get_output_embeddings(), hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
    if type(head) is nn.Linear and head.bias is None:
        logits = (hidden.float() * head.weight[tokens].float()).sum(-1)
    else:  # With LoRA, the head adds what it has learned to its weight. With FSDP, it has its weight only in a call.
        logits = head(hidden).float().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return llm_weight * logits + batch["prior"]


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Return whether each position attends to each position, (B, T, T) bool: to earlier ones of context and own part.

    So the output at a candidate does not depend on the other candidates (InvariRank, arXiv 2604.27599).

    Args:
        segments: (B, T), see `ListInput`.
    """
    causal = torch.ones(segments.size(1), segments.size(1), dtype=torch.bool, device=segments.device).tril()
    own = segments.unsqueeze(1) == segments.unsqueeze(2)
    return causal & (own | (segments == 0).unsqueeze(1))


def listwise_loss(scores: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """Return the softmax cross-entropy of each list in nats, (B,).

    The target distribution is the relevance divided by its sum, as in the fit of the prior.

    Args:
        scores: (B, K), -inf for padding.
        relevance: (B, K), 0 for padding, at least one value of a list above 0.
    """
    target = relevance / relevance.sum(-1, keepdim=True)
    return -(target * scores.log_softmax(-1).masked_fill(target == 0, 0.0)).sum(-1)


def pairwise_loss(scores: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """Return the logistic loss of each list, (B,): the mean of log(1 + exp(s_j - s_i)) over pairs with i above j.

    Args:
        scores: (B, K), -inf for padding.
        relevance: (B, K), 0 for padding.
    """
    real = scores > -torch.inf
    scores = scores.masked_fill(~real, 0.0)
    pairs = (relevance.unsqueeze(2) > relevance.unsqueeze(1)) & real.unsqueeze(1)
    losses = functional.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))
    return losses.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


LOSSES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "listwise": listwise_loss,
    "pairwise": pairwise_loss,
}


class ListTrainer(Trainer):
    """A trainer whose loss is the mean over the lists of a step. The order of the lists is that of `LengthSampler`.

    A list without relevance has no loss. With several processes the last list is one, and completes the last step of a
    pass.

    Args:
        loss: name of the loss, one of `LOSSES`.
        llm_weight: power of the model's probability.
        bf16: train under bfloat16 autocast.
    """

    def __init__(self, *args: Any, loss: str, llm_weight: float, bf16: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = bf16
        self.list_loss, self.llm_weight = LOSSES[loss], llm_weight
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of lists of a step

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        lists: Any = self.train_dataset
        return length_sampler(self, [len(each.input_ids) for each in lists])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step, and the number of its lists in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["relevance"].sum(-1) > 0).sum() for batch in batches)
        return batches, self.accelerator.gather(torch.as_tensor(count, device=device)).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the sum of the losses of a batch, divided by the number of lists of the step."""
        if return_outputs:
            raise ValueError("ListTrainer returns no outputs")
        compute = partial(list_scores, llm_weight=self.llm_weight)
        scores = through(self.accelerator, model, compute, inputs, self.autocast)
        relevant = inputs["relevance"].sum(-1) > 0
        losses = self.list_loss(scores[relevant], inputs["relevance"][relevant])
        count = relevant.sum() if num_items_in_batch is None else num_items_in_batch
        # DDP, FSDP and DeepSpeed average the gradients of the processes, and `count` is that of all of them.
        return losses.sum() / count * self.accelerator.num_processes


def train_lists(
    model: Any,
    tokenizer: Any,
    lists: Sequence[ListInput],
    folder: Path,
    *,
    loss: str,
    llm_weight: float,
    training: Training,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, float]]:
    """Train `model` in place to score lists. Continue from the last checkpoint in `folder` if there is one.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        lists: the training lists, with their relevance.
        folder: folder of the checkpoints.
        loss: `listwise` or `pairwise`.
        llm_weight: power of the model's probability beside the prior.
        training: how the model is trained, with a number of steps.
        say: prints progress.

    Returns:
        The log, one dict per line, with the key `loss`.

    Raises:
        ConfigurationError: there are no lists, or a list is longer than the context of the model.
        QualityCheckError: the loss or a gradient is not finite.
    """
    check_context(model, lists, where=str(folder))
    if WORLD_SIZE > 1:  # A list without relevance completes the last step of a pass.
        lists = [*lists, replace(lists[0], relevance=[0.0] * len(lists[0].relevance))]
    with trainable(model) as trained:
        trainer = ListTrainer(
            model=trained,
            args=TrainingArguments(**training_options(folder, training)),
            train_dataset=list(lists),
            processing_class=tokenizer,
            loss=loss,
            llm_weight=llm_weight,
            bf16=training.bf16,
            callbacks=[ProgressLines(say), FiniteLoss(), CompleteCheckpoints()],
            data_collator=ListCollator(tokenizer.pad_token_id),
        )
        return train_from_checkpoint(trainer, folder)


def score_lists(
    model: Any, lists: Sequence[ListInput], *, pad_id: int, llm_weight: float, batch_size: int, bf16: bool = False
) -> list[list[float]]:
    """Return the log-probability of each candidate to be the best one, B lists of K numbers in nats.

    The first tokens that all lists share are read once.

    Args:
        model: a causal language model.
        lists: the lists.
        pad_id: id of the padding token.
        llm_weight: power of the model's probability beside the prior.
        batch_size: lists that are read together. It changes the speed only.
        bf16: run the model under bfloat16 autocast.

    Raises:
        ConfigurationError: a list is longer than the context of the model.
    """
    check_context(model, lists, where="score_lists")
    collate, result = ListCollator(pad_id), [[0.0]] * len(lists)
    batches = by_length([len(each.input_ids) for each in lists], batch_size)
    with evaluating(model), torch.no_grad(), bf16_autocast(model.device, bf16):
        shared = shared_length(lists) if len(lists) > 1 else 0
        prefix = Prefix.read(model, lists[0].input_ids[:shared])
        for positions in progress(batches, "scores, batch"):
            batch = {name: part.to(model.device) for name, part in collate([lists[n] for n in positions]).items()}
            rows = list_scores(model, batch, llm_weight, prefix).log_softmax(-1).tolist()
            for position, row in zip(positions, rows, strict=True):
                result[position] = row[: len(lists[position].prior)]
    return result


def check_context(model: Any, lists: Sequence[ListInput], *, where: str) -> None:
    """Check that there are lists, and that they fit the context of the model.

    Raises:
        ConfigurationError: there are no lists, or a list is too long, also for a sliding window of attention.
    """
    longest = max((len(each.input_ids) for each in lists), default=0)
    if any(each.segments for each in lists):
        check_window(model, longest)
    context = getattr(model.config, "max_position_embeddings", None) or longest
    if not 0 < longest <= context:
        raise ConfigurationError(
            f"{len(lists)} lists of up to {longest} tokens do not fit the context of {context} tokens",
            where=where,
            why="at least one list is needed, and prompts are never cut",
            do="shorten the prompts (prompt_history, prompt_title_chars)",
        )
