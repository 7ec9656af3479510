"""Build model inputs: padding, position ids, attention masks, and the mode of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from recbole_gr2.errors import ConfigurationError


def left_pad(
    sequences: Sequence[Sequence[int]], value: int, device: torch.device, *, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, P), padded with `value` on the left, and their attention mask (B, P).

    Args:
        sequences: token ids of B texts.
        value: id of the padding token.
        device: device of the tensors.
        start: number of first tokens of each text that stay before its padding.

    >>> [part.tolist() for part in left_pad([[7, 8], [7]], 0, torch.device("cpu"))]
    [[[7, 8], [0, 7]], [[1, 1], [0, 1]]]
    >>> [part.tolist() for part in left_pad([[7, 8, 9], [7, 6]], 0, torch.device("cpu"), start=1)]
    [[[7, 8, 9], [7, 0, 6]], [[1, 1, 1], [1, 0, 1]]]
    """
    length = max(map(len, sequences))
    ids = [[*text[:start], *[value] * (length - len(text)), *text[start:]] for text in sequences]
    mask = [[1] * start + [0] * (length - len(text)) + [1] * (len(text) - start) for text in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def right_pad(
    sequences: Sequence[Sequence[int]], value: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, P), padded with `value` on the right, and their lengths (B,).

    >>> [part.tolist() for part in right_pad([[7, 8], [], [9]], 0, torch.device("cpu"))]
    [[[7, 8], [0, 0], [9, 0]], [2, 0, 1]]
    """
    lengths = torch.tensor([len(text) for text in sequences], device=device)
    return padded(sequences, value).long().to(device), lengths


def padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    """Return rows of different lengths as one tensor on the CPU, filled with `value` on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def common_length(texts: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that are equal in all texts.

    >>> common_length([[7, 8, 1, 2], [7, 8, 3]]), common_length([[7], []])
    (2, 0)
    """
    for length, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return min(map(len, texts), default=0)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return position ids (B, P) that count real tokens, as `generate` does. Padding does not shift a prompt."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def attention_bias(visible: torch.Tensor, model: Any) -> torch.Tensor:
    """Return the tensor (B, 1, Q, T) that transformers adds to attention scores. It replaces the mask of the model.

    Args:
        visible: Boolean (B, Q, T): whether each of Q tokens attends to each of T tokens.
        model: The model, for its dtype.
    """
    bias = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(model.dtype).min).unsqueeze(1)


def check_window(model: Any, longest: int) -> None:
    """Check that texts of `longest` tokens fit the sliding window of a model. `attention_bias` has no window.

    Raises:
        ConfigurationError: The model has a sliding window of fewer than `longest` tokens.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise ConfigurationError(
            f"a prompt and its continuation have {longest} tokens, but the window of the model has {window}",
            where="llm",
            why="all continuations of a prompt are read in one sequence and have to attend to the whole prompt",
            do="use shorter histories (mid_max_length, prompt_history) or a model without a sliding window",
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set the model to eval mode, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def bf16_autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Return a context with bfloat16 autocast if `bf16`, else one without effect."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
