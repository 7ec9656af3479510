"""What of a model is trained: LoRA, so that a large one fits on one GPU, or the rows of the new tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def with_lora(model, rank: int, new_tokens: Sequence[int]):
    """`model` with LoRA of this rank on every linear layer; rank 0 gives the model itself, to be trained whole.

    Args:
        new_tokens: ids of tokens the pretrained model does not know; their embeddings are trained too. (To name
            `embed_tokens` among LoRA's target modules instead gives a merged model that differs from the trained one.)
    """
    if rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None  # peft asks a tied head for it
    rows = {"embed_tokens": list(new_tokens)}
    if not model.config.tie_word_embeddings:  # else the head is the embedding, and peft trains both as one
        rows["lm_head"] = list(new_tokens)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )
    return get_peft_model(model, config)


@contextmanager
def new_rows_alone(model, new_tokens: Sequence[int]) -> Iterator[None]:
    """Inside, nothing of `model` is trainable but the embedding rows of these tokens (and the head's, if untied).

    Other rows get no gradient, and so stay as they are under an optimizer without weight decay. (PEFT has this, too,
    but TRL's SFTTrainer refuses its adapter on an untied head.)
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    hooks = []
    for parameter in trainable:
        parameter.requires_grad_(parameter in weights)
        if parameter in weights:
            keep = torch.zeros(len(parameter), 1, device=parameter.device, dtype=parameter.dtype)
            keep[list(new_tokens)] = 1.0
            hooks.append(parameter.register_hook(lambda gradient, keep=keep: gradient * keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in trainable.items():
            parameter.requires_grad_(before)


def merged(model):
    """The plain model with its LoRA weights added in."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
