"""From a checkpoint's name to what a model is built with, and from a saved folder to what transformers 4 can read."""

import json
import logging
import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_relative_bert import RELATIVE_TYPES

logger = logging.getLogger(__name__)

POSITION_EMBEDDING_TYPES = ("absolute", *RELATIVE_TYPES)


def resolve_position_embedding_type(config: PreTrainedConfig, name: str, requested: str | None = None) -> str:
    """The position type to build the checkpoint `name` with: `requested`, or where that is None its own.

    Raises ValueError for an unknown type, a relative one of a model that is not BERT, and absolute positions of a
    checkpoint that was trained without them.
    """
    own = getattr(config, "position_embedding_type", None) or "absolute"
    position_type = requested or own
    if position_type not in POSITION_EMBEDDING_TYPES:
        raise ValueError(
            f"position_embedding_type {position_type!r} is unknown: use one of {', '.join(POSITION_EMBEDDING_TYPES)}"
        )
    if position_type in RELATIVE_TYPES and config.model_type != "bert":
        raise ValueError(
            f"position_embedding_type {position_type} is for BERT, but {name} is of model_type {config.model_type}: "
            "use absolute, or a BERT checkpoint"
        )
    if position_type == "absolute" and own in RELATIVE_TYPES:
        raise ValueError(
            f"{name} was trained with {own} and has no trained absolute positions: leave position_embedding_type out, "
            f"or use {' or '.join(RELATIVE_TYPES)}"
        )
    return position_type


@torch.no_grad()
def grow_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Gives a model with relative positions room for windows of `length` tokens, and logs it; else changes nothing.

    With n positions, its tables of 2 * n - 1 rows know distances up to n - 1. Clipping larger ones to that (Shaw et al.
    2018, section 3.2) is the same as repeating the outermost rows, which is what happens here. So the logits of a
    window of n tokens or fewer do not change, training in longer ones trains each row for its own distance, and the
    saved model is one of `length` positions to every program. The absolute table, which takes no part, gets zeros.
    """
    config = model.config
    if getattr(config, "position_embedding_type", None) not in RELATIVE_TYPES:
        return
    # Also where the model has grown before and the tokenizer has not: each may come from a folder of its own.
    tokenizer.model_max_length = max(length, tokenizer.model_max_length)
    positions = config.max_position_embeddings
    more = length - positions
    if more <= 0:
        return
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        rows = attention.distance_embedding.weight  # (2 * positions - 1, head size)
        rows = torch.cat([rows[:1].expand(more, -1), rows, rows[-1:].expand(more, -1)])
        set_rows(attention.distance_embedding, rows)
        attention.max_position_embeddings = length
    absolute = model.bert.embeddings.position_embeddings
    set_rows(absolute, nn.functional.pad(absolute.weight, (0, 0, 0, more)))
    config.max_position_embeddings = length
    logger.info(
        "Relative positions grow from %d tokens to %d (--max_seq_length): distances beyond %d start as that one.",
        positions,
        length,
        positions - 1,
    )


def set_rows(embedding: nn.Embedding, rows: torch.Tensor) -> None:
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(rows)


def rename_extra_special_tokens(folder: str | os.PathLike) -> None:
    """Lets transformers 4 load a tokenizer that transformers 5 saved in `folder`; 5 reads either name.

    The further special tokens are a list named extra_special_tokens in 5; 4 has them as additional_special_tokens, and
    fails on a list of the other name. Without such tokens, or without a tokenizer in `folder`, nothing changes.
    """
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    if not isinstance(settings.get("extra_special_tokens"), list):
        return
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2, ensure_ascii=False, sort_keys=True)
        file.write("\n")
    os.replace(path + ".tmp", path)
