"""What of a model is trained: LoRA, so that a large one fits on one GPU, or the rows of the new tokens alone."""

from __future__ import annotations

from collections.abc import Sequence


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
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )  # fmt: skip
    return get_peft_model(model, config)


def with_token_rows(model, new_tokens: Sequence[int]):
    """`model` with everything frozen but the embedding rows of these tokens (and the head's, where it is not tied)."""
    from peft import TrainableTokensConfig, get_peft_model

    tied = model.config.tie_word_embeddings
    config = TrainableTokensConfig(
        token_indices=list(new_tokens), target_modules=["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    )
    return get_peft_model(model, config)


def merged(model):
    """The plain model with what PEFT trained added in."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
