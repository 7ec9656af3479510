"""The trained parameters of a model: all, LoRA, or only the embeddings of new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from recbole_gr2.distributed import uses_fsdp
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.sharding import ROWS


def with_lora(model: Any, rank: int, new_tokens: Sequence[int]) -> Any:
    """Return `model` with LoRA of this rank on every linear layer. Rank 0 returns the model itself.

    Args:
        model: A causal language model of transformers.
        rank: Rank of the LoRA matrices. 0 trains all parameters.
        new_tokens: Ids of tokens that the pretrained model does not know. Their embeddings are trained, too. (If
            `embed_tokens` were a target module of LoRA, the merged model would differ from the trained one.)

    Raises:
        ConfigurationError: FSDP does not support the adapter.
    """
    if rank == 0:
        return model
    if uses_fsdp() and model.config.tie_word_embeddings:
        raise ConfigurationError(
            "FSDP cannot train LoRA of a model whose head is its embedding",
            where="llm_lora_rank",
            why="PEFT puts the trained rows of the new tokens into both, and FSDP would shard the weight twice",
            do="set llm_lora_rank: 0, or use properties/accelerate/ddp.yaml or deepspeed.yaml",
        )
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None  # peft reads the bias of a tied head
    indices = {"embed_tokens": list(new_tokens)}
    if not model.config.tie_word_embeddings:  # otherwise the head is the embedding, and peft trains both as one
        indices["lm_head"] = list(new_tokens)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=indices,
    )
    return get_peft_model(model, config)


@contextmanager
def new_rows_alone(model: Any, new_tokens: Sequence[int]) -> Iterator[None]:
    """Within this context, train only the embeddings of `new_tokens` (and their rows of the head, if it is not tied).

    All other rows get no gradient, and an optimizer without weight decay does not change them. (PEFT can do the same,
    but TRL's SFTTrainer refuses such an adapter if the head is not tied.)
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {module.weight for module in ends}
    hooks = []
    for parameter in trainable:
        parameter.requires_grad_(parameter in weights)
        if parameter in weights:
            keep = torch.zeros(len(parameter), 1, device=parameter.device, dtype=parameter.dtype)
            keep[list(new_tokens)] = 1.0
            hooks.append(parameter.register_hook(lambda gradient, keep=keep: gradient * keep))
    for module in ends:
        setattr(module, ROWS, keep)
    try:
        yield
    finally:
        for module in ends:
            delattr(module, ROWS)
        for hook in hooks:
            hook.remove()
        for parameter, before in trainable.items():
            parameter.requires_grad_(before)


def base_model(model: Any) -> Any:
    """Return the model of transformers within a model of PEFT. The LoRA layers are part of it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(model: Any) -> Any:
    """Return the plain model, with the LoRA weights added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
