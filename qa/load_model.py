"""From a checkpoint's name to configuration, tokenizer and model, and from a saved folder to what others can read."""

import json
import logging
import os

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qa import hub
from qa.files import QAError, one_line
from qa.modeling_relative_bert import RELATIVE_TYPES, RelativeBertForQuestionAnswering
from qa.windows import check_tokenizer

logger = logging.getLogger(__name__)

POSITION_EMBEDDING_TYPES = ("absolute", *RELATIVE_TYPES)


def load_config(name: str, position_embedding_type: str | None = None, config_name: str | None = None, **source):
    """The configuration of the model `name`, or `config_name`, with the position type that was asked for.

    `name`: a folder, or a name on the hub; `source`: as `_from_hub` takes it. Raises ValueError where there is no such
    model, or the position type does not suit it.
    """
    config = _from_hub(AutoConfig, config_name or name, "a configuration", **source)
    position_type = resolve_position_embedding_type(config, name, position_embedding_type)
    if config.model_type == "bert":
        config.position_embedding_type = position_type
    config.num_labels = 2  # start and end, whatever the checkpoint was trained for before
    return config


def position_type_of(config) -> str:
    return getattr(config, "position_embedding_type", None) or "absolute"


def load_tokenizer(name: str, **source):
    tokenizer = _from_hub(AutoTokenizer, name, "a tokenizer", **source)
    check_tokenizer(tokenizer)
    return tokenizer


def load_model(name: str, config, **source) -> PreTrainedModel:
    """The model `name` built by `config`, its new parameters logged. Raises ValueError where it cannot be loaded."""
    model, report = _load(name, config, **source)
    if report["missing_keys"]:
        logger.info("New parameters, not in %s: %s.", name, ", ".join(sorted(report["missing_keys"])))
    return model


def load_trained_model(folder: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a run has saved in `folder`; its positions may have grown since that run began.

    Raises QAError where one of its weights is missing there.
    """
    source = {"trust_remote_code": trust_remote_code}
    model, report = _load(folder, load_config(folder, **source), **source)
    check_all_weights(report, folder)
    return model


def _load(name: str, config, **source) -> tuple[PreTrainedModel, dict]:
    absolute = position_type_of(config) == "absolute"
    model_class = AutoModelForQuestionAnswering if absolute else RelativeBertForQuestionAnswering
    # float32 whatever the checkpoint is in: half precision is --bf16's and --fp16's, by autocast.
    settings = {"config": config, "output_loading_info": True, "dtype": torch.float32}
    with hub.download_bars():
        model, report = _from_hub(model_class, name, "a model", **settings, **source)
    if any("distance_embedding" in key for key in report["unexpected_keys"]):
        raise QAError(
            f"{name} has relative position embeddings, but the configuration says {position_type_of(config)}: leave "
            "--config_name out, or give one with the checkpoint's own position_embedding_type"
        )
    # Saved by the names of today; transformers would write those of the file back, such as Google's gamma and beta.
    model.__dict__.pop("_weight_conversions", None)
    return model, report


def _from_hub(
    auto_class, name: str, what: str, revision="main", token=None, cache_dir=None, trust_remote_code=False, **settings
):
    source = {"revision": revision, "token": token, "cache_dir": cache_dir}
    with hub.loading(f"cannot load {what} from {name}", name, "model", **source):
        return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **source, **settings)


def check_length(max_seq_length: int, model, tokenizer) -> None:
    """Raises ValueError where windows of `max_seq_length` tokens are longer than the model has positions for, or the
    tokenizer has more tokens than it has embeddings for."""
    longest = getattr(model.config, "max_position_embeddings", None)
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if longest is not None and getattr(embeddings, "padding_idx", None) is not None:
        longest -= embeddings.padding_idx + 1  # RoBERTa counts positions from there
    if longest is not None and max_seq_length > longest:
        raise QAError(
            f"--max_seq_length is {max_seq_length}, but the model has positions for {longest} tokens only; BERT with "
            "relative positions (position_embedding_type relative_key, relative_key_query) takes longer windows"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise QAError(f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {rows} only")


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Loads all weights of `model` from `folder`, whatever names they have there that transformers can read.

    Raises QAError that names the weights which are missing, left over or of another shape.
    """
    try:
        loaded, report = type(model).from_pretrained(
            folder, config=model.config, dtype=model.dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise QAError(f"cannot load the weights in {folder}: {one_line(error)}") from error
    check_all_weights(report, folder)
    model.load_state_dict(loaded.state_dict())


def check_all_weights(report: dict, folder: str) -> None:
    """Raises QAError for what from_pretrained reports to be missing or left over in `folder`."""
    wrong = [
        f"{kind}: {', '.join(sorted(report[key]))}"
        for kind, key in (("missing", "missing_keys"), ("left over", "unexpected_keys"))
        if report[key]
    ]
    if wrong:
        raise QAError(f"the weights in {folder} are not those of this model. {'; '.join(wrong)}")


def resolve_position_embedding_type(config: PreTrainedConfig, name: str, requested: str | None = None) -> str:
    """The position type to build the checkpoint `name` with: `requested`, or where that is None its own.

    Raises ValueError for an unknown type, a relative one of a model that is not BERT, and absolute positions of a
    checkpoint that was trained without them.
    """
    own = getattr(config, "position_embedding_type", None) or "absolute"
    position_type = requested or own
    if position_type not in POSITION_EMBEDDING_TYPES:
        raise QAError(
            f"position_embedding_type {position_type!r} is unknown: use one of {', '.join(POSITION_EMBEDDING_TYPES)}"
        )
    if position_type in RELATIVE_TYPES and config.model_type != "bert":
        raise QAError(
            f"position_embedding_type {position_type} is for BERT, but {name} is of model_type {config.model_type}: "
            "use absolute, or a BERT checkpoint"
        )
    if position_type == "absolute" and own in RELATIVE_TYPES:
        raise QAError(
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
