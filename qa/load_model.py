"""From a checkpoint's name to configuration, tokenizer and model, and from a saved folder to what others can read."""

import inspect
import logging
import re
from pathlib import Path

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
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from qa import hub
from qa.files import QAError, one_line, read_json, write_json
from qa.modeling_relative_bert import RELATIVE_TYPES, RelativeBertForQuestionAnswering
from qa.question_answering_pipeline import absolute_positions, custom_pipelines

logger = logging.getLogger(__name__)

POSITION_EMBEDDING_TYPES = ("absolute", *RELATIVE_TYPES)
PIPELINE_SETTINGS = {  # our settings of windows and answers, as the question-answering pipeline names them
    "max_seq_length": "max_seq_len",
    "doc_stride": "doc_stride",
    "max_query_length": "max_question_len",
    "n_best_size": "n_best_size",
    "max_answer_length": "max_answer_len",
    "version_2_with_negative": "handle_impossible_answer",
    "null_score_diff_threshold": "null_score_diff_threshold",
}


def load_config(name: str, position_embedding_type: str | None = None, config_name: str | None = None, **source):
    """The configuration of the model `name`, or `config_name`, with the position type that was asked for.

    `name`: a folder, or a name on the hub; `source`: as `_load` takes it. Raises QAError where there is no such
    model, the position type does not suit it, or its class is code of its own that is not trusted.
    """
    try:
        config = _load(AutoConfig.from_pretrained, config_name or name, "a configuration", **source)
    except QAError as error:
        if "`model_type` key" not in str(error):
            raise
        raise QAError(
            f"cannot load a configuration from {config_name or name}: there is no config.json, or it has no "
            'model_type: add it (such as "model_type": "bert"), or give a file that has it as --config_name'
        ) from error
    own_class = (getattr(config, "auto_map", None) or {}).get("AutoModelForQuestionAnswering", "")
    ours = own_class.endswith(f".{RelativeBertForQuestionAnswering.__name__}")
    if own_class and not ours and not source.get("trust_remote_code"):
        raise QAError(f"{name} has a model class of its own, {own_class}: give --trust_remote_code to run it")
    position_type = resolve_position_embedding_type(config, name, position_embedding_type)
    if config.model_type == "bert":
        config.position_embedding_type = position_type
    config.num_labels = 2  # start and end, whatever the checkpoint was trained for before
    return config


def add_pipeline(config: PreTrainedConfig, settings) -> None:
    """Lets `transformers.pipeline` find what answers by the model, and by which `settings` it is trained."""
    config.custom_pipelines = custom_pipelines()
    config.qa_settings = {theirs: getattr(settings, ours) for ours, theirs in PIPELINE_SETTINGS.items()}


def resolve_position_embedding_type(config: PreTrainedConfig, name: str, requested: str | None = None) -> str:
    """The position type to build the checkpoint `name` with: `requested`, or where that is None its own.

    Raises QAError for an unknown type, a relative one of a model that is not BERT, and absolute positions of a
    checkpoint that was trained without them.
    """
    own = position_type_of(config)
    position_type = requested or own
    if position_type not in POSITION_EMBEDDING_TYPES:
        known = ", ".join(POSITION_EMBEDDING_TYPES)
        raise QAError(f"position_embedding_type {position_type!r} is unknown: use one of {known}")
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


def position_type_of(config: PreTrainedConfig) -> str:
    return getattr(config, "position_embedding_type", None) or "absolute"


def load_tokenizer(name: str, do_lower_case: bool | None = None, **source) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`; where its folder does not say whether it lower-cases, `do_lower_case` does.

    Raises QAError where there is none, or not one that windows can be made by, or `do_lower_case` is not what it does.
    Capitals in the vocabulary of one that lower-cases are logged.
    """
    settings = {}
    if do_lower_case is not None and "do_lower_case" not in _load(get_tokenizer_config, name, "a tokenizer", **source):
        settings["do_lower_case"] = do_lower_case
    tokenizer = _load(AutoTokenizer.from_pretrained, name, "a tokenizer", **settings, **source)
    check_tokenizer(tokenizer)
    normalizer = tokenizer.backend_tokenizer.normalizer
    lower_cases = normalizer is not None and "a" in normalizer.normalize_str("A")
    if do_lower_case not in (None, lower_cases):
        raise QAError(
            f"--do_lower_case is {do_lower_case}, but the tokenizer of {name} {'does' if lower_cases else 'does not'} "
            "lower-case text: leave the flag out, or use another tokenizer"
        )
    tokens = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() if lower_cases else ()
    if cased := sorted(token for token in tokens if re.search("[A-Z]", token)):
        logger.warning(
            f"The tokenizer of {name} lower-cases text, but {len(cased)} of its {len(tokens)} tokens have capitals and "
            f"never occur (such as {cased[0]}): if the model is a cased one, give --do_lower_case False."
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises QAError for a tokenizer that is slow, pads on the left or has no padding token."""
    name = f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'no name'}"
    if not tokenizer.is_fast:
        raise QAError(f"{name} is a slow tokenizer: it gives no character offsets; use a model with a fast one")
    if tokenizer.padding_side != "right":
        raise QAError(f"{name} pads on the {tokenizer.padding_side}: use a model whose tokenizer pads on the right")
    if tokenizer.pad_token_id is None:
        raise QAError(f"{name} has no padding token: use a model whose tokenizer has one")


def load_model(name: str, config: PreTrainedConfig, complete: bool = False, **source) -> PreTrainedModel:
    """The model `name` built by `config`, its new parameters logged.

    `complete`: nothing is going to train it, so that none may be new. Raises QAError for those, for weights of another
    shape than `config` says, and where the model cannot be loaded.
    """
    model, missing = load_weights_there(name, config, **source)
    if missing and complete:
        raise QAError(
            f"{name} lacks {_some(missing)}: it was not trained to answer questions with them; train it with "
            "run_squad.py first"
        )
    if missing:
        logger.info("New parameters, not in %s: %s.", name, ", ".join(missing))
    return model


def load_weights_there(name: str, config: PreTrainedConfig, **source) -> tuple[PreTrainedModel, list[str]]:
    """As `load_model`, with the names of the parameters that are new, of which it says nothing."""
    absolute = position_type_of(config) == "absolute"
    model_class = AutoModelForQuestionAnswering if absolute else RelativeBertForQuestionAnswering
    # float32 whatever the checkpoint is in: half precision is --bf16's and --fp16's, by autocast.
    settings = {"config": config, "output_loading_info": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    model, report = _load(model_class.from_pretrained, name, "a model", **settings, **source)
    if any("distance_embedding" in key for key in report["unexpected_keys"]):
        raise QAError(
            f"{name} has relative position embeddings, but the configuration says {position_type_of(config)}: leave "
            "--config_name out, or give one with the checkpoint's own position_embedding_type"
        )
    if mismatched := sorted(key for key, *_ in report["mismatched_keys"]):
        raise QAError(
            f"the weights of {name} have other shapes than the configuration says ({_some(mismatched)}): its "
            "config.json, or what --config_name names, is of another model"
        )
    # Saved by the names of today; transformers would write those of the file back, such as Google's gamma and beta.
    model.__dict__.pop("_weight_conversions", None)
    return model, sorted(report["missing_keys"])


def load_trained_model(folder: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a run has saved in `folder`. Raises QAError where one of its weights is missing there."""
    source = {"trust_remote_code": trust_remote_code}
    return load_model(folder, load_config(folder, **source), complete=True, **source)


def _some(names: list[str]) -> str:
    """The first names, and how many more there are, for a message of one line."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _load(load, name, what, revision="main", token=None, cache_dir=None, trust_remote_code=False, **settings):
    source = {"revision": revision, "token": token, "cache_dir": cache_dir}
    with hub.loading(f"cannot load {what} from {name}", name, "model", **source):
        return load(name, trust_remote_code=trust_remote_code, **source, **settings)


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Loads all weights of `model` from `folder`, whatever names they have there that transformers can read.

    Raises QAError that names the weights which are missing, left over or of another shape.
    """
    settings = {"config": model.config, "dtype": model.dtype, "output_loading_info": True}
    try:
        loaded, report = type(model).from_pretrained(folder, **settings)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise QAError(f"cannot load the weights in {folder}: {one_line(error)}") from error
    names = {"missing": report["missing_keys"], "left over": report["unexpected_keys"]}
    wrong = [f"{kind}: {', '.join(sorted(keys))}" for kind, keys in names.items() if keys]
    if wrong:
        raise QAError(f"the weights in {folder} are not those of this model. {'; '.join(wrong)}")
    model.load_state_dict(loaded.state_dict())


def check_length(max_seq_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises QAError where the model has too few positions for `max_seq_length`, or embeddings for the tokenizer."""
    longest = absolute_positions(model)
    if longest is not None and max_seq_length > longest:
        raise QAError(
            f"--max_seq_length is {max_seq_length}, but the model has positions for {longest} tokens only; BERT with "
            "relative positions (position_embedding_type relative_key, relative_key_query) takes longer windows"
        )
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise QAError(f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {rows} only")


def fit_token_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leaves token types out of what the tokenizer gives, also when it is saved, where the model has no two of them."""
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    tells_apart = takes_types and getattr(model.config, "type_vocab_size", None) != 1
    if "token_type_ids" in tokenizer.model_input_names and not tells_apart:
        inputs = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = inputs
        logger.info("Token types are left out: the model does not tell them apart.")


@torch.no_grad()
def resize_position_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Gives a model with relative positions room for windows of `length` tokens, and logs it; else changes nothing.

    With n positions, its tables of 2 * n - 1 rows know distances up to n - 1. Clipping larger ones to that (Shaw et al.
    2018, section 3.2) is the same as repeating the outermost rows, which is done here: logits of windows up to n tokens
    do not change, training in longer ones trains each row for its own distance, and the saved model is one of `length`
    positions to every program. The absolute table, which takes no part, gets zeros.
    """
    if position_type_of(model.config) == "absolute":
        return
    # Also where the model has room already and the tokenizer has not: each may come from a folder of its own.
    tokenizer.model_max_length = max(length, tokenizer.model_max_length)
    positions = model.config.max_position_embeddings
    more = length - positions
    if more <= 0:
        return
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        rows = attention.distance_embedding.weight  # (2 * positions - 1, head size)
        rows = torch.cat([rows[:1].expand(more, -1), rows, rows[-1:].expand(more, -1)])
        attention.distance_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        attention.max_position_embeddings = length
    embeddings = model.bert.embeddings
    absolute = nn.functional.pad(embeddings.position_embeddings.weight, (0, 0, 0, more))
    embeddings.position_embeddings = nn.Embedding.from_pretrained(absolute, freeze=True)
    model.config.max_position_embeddings = length
    grown = "Relative positions grow from %d tokens to %d (--max_seq_length): distances beyond %d start as that one."
    logger.info(grown, positions, length, positions - 1)


def rename_extra_special_tokens(folder: str | Path) -> None:
    """Lets transformers 4 load a tokenizer that transformers 5 saved in `folder`; 5 reads either name.

    The further special tokens are a list named extra_special_tokens in 5, on which 4 fails: it has them as
    additional_special_tokens. Without such tokens, or without a tokenizer in `folder`, nothing changes.
    """
    path = Path(folder, "tokenizer_config.json")
    settings = read_json(path)
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        write_json(path, settings)
