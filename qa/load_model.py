"""From a checkpoint's name to what a model is built with, and from a saved folder to what transformers 4 can read."""

import json
import os

from transformers import PreTrainedConfig

from qa.modeling_relative_bert import RELATIVE_TYPES

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
