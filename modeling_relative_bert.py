"""BERT for question answering with relative position embeddings (Shaw et al. 2018; Huang et al. 2020, method 4).

This one file is all that a saved model needs besides transformers: `save_pretrained` copies it beside the weights, and
`AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)` imports it from there.
"""

import json
import os

import torch
import transformers
from torch import nn

if transformers.__version__.startswith("4."):  # before the imports that 4 does not have
    raise ImportError(
        "this file is for transformers 5; 4 has relative positions of its own: load without trust_remote_code"
    )

from transformers import BertConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertForQuestionAnswering,
    BertModel,
    BertPreTrainedModel,
    BertSelfAttention,
    eager_attention_forward,
)

POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")
RELATIVE_TYPES = ("relative_key", "relative_key_query")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


class RelativeBertForQuestionAnswering(BertForQuestionAnswering):
    """BERT with relative positions and a span head: inputs, outputs and parameter names of BertForQuestionAnswering.

    `config` is a BertConfig that carries `position_embedding_type` (relative_key or relative_key_query). Raises
    ValueError for another type, a decoder or cross-attention config, or an attention that cannot take a bias.
    """

    def __init__(self, config: BertConfig):
        check_config(config)
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = RelativeBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def initialize_weights(self):
        super().initialize_weights()
        # Building and loading both end here, and loading has put new parameters in place.
        self.bert.embeddings.position_embeddings.requires_grad_(False)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        check_attention_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        # The name by which transformers 4 finds the architecture; its own BERT reads position_embedding_type.
        self.config.architectures = ["BertForQuestionAnswering"]
        if is_main_process:
            self.config.save_pretrained(save_directory)


class RelativeBertModel(BertModel):
    _no_split_modules = ["RelativeBertEmbeddings", "BertLayer"]

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer)
        self.embeddings = RelativeBertEmbeddings(config)
        for layer_idx, layer in enumerate(self.encoder.layer):
            layer.attention.self = RelativeBertSelfAttention(config, layer_idx=layer_idx)
        self.post_init()


class RelativeBertEmbeddings(BertEmbeddings):
    """Word and token type embeddings. The absolute ones stay for the checkpoint's sake, neither added nor trained."""

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, cache_length=0):
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (batch, length, hidden)
        batch, length, _ = inputs_embeds.shape
        max_length = self.position_embeddings.num_embeddings
        if length > max_length:
            raise ValueError(
                f"sequence of {length} tokens, but max_position_embeddings is {max_length}: shorten the input"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros(batch, length, dtype=torch.long, device=inputs_embeds.device)
        return self.dropout(self.LayerNorm(inputs_embeds + self.token_type_embeddings(token_type_ids)))


class RelativeBertSelfAttention(BertSelfAttention):
    """BERT's self-attention with a learned embedding e of the distance i - j from key j to query i.

    Scores before the softmax are (q_i·k_j + q_i·e_{i-j} [+ k_j·e_{i-j}]) / sqrt(head size), the last term for
    relative_key_query. Row i - j + max_position_embeddings - 1 of `distance_embedding` holds e_{i-j}.
    """

    def __init__(self, config: BertConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.position_embedding_type = config.position_embedding_type
        self.max_position_embeddings = config.max_position_embeddings
        self.distance_embedding = nn.Embedding(2 * config.max_position_embeddings - 1, self.attention_head_size)

    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        """(batch, length, hidden) -> the same shape, and (batch, heads, length, length) probabilities under eager."""
        batch, length, _ = hidden_states.shape
        heads = (batch, length, self.num_attention_heads, self.attention_head_size)
        query = self.query(hidden_states).view(heads).transpose(1, 2)  # (batch, heads, length, head size)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)

        first = self.max_position_embeddings - length  # the row of distance 1 - length, that of query 0 to the last key
        rows = self.distance_embedding.weight[first : first + 2 * length - 1].to(query.dtype)
        bias = relative_scores(query, rows)  # (batch, heads, length, length)
        if self.position_embedding_type == "relative_key_query":
            bias = bias + relative_scores(key, rows.flip(0)).transpose(-1, -2)
        bias = bias * self.scaling
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
            else:
                bias = bias + attention_mask

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        context, probabilities = attention(
            self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (batch, length, heads, head size)
        return context.reshape(batch, length, -1), probabilities


def relative_scores(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores of each query with the embedding of its distance to each key; no (length, length, head size) tensor.

    `queries` (..., length, head size), `rows` (2 * length - 1, head size) by rising distance; returns
    (..., length, length), entry [i, j] = queries[i] · rows[i - j + length - 1]. Each query times all rows, then each
    line shifted by a strided view, as in Music Transformer (Huang et al. 2018).
    """
    length = queries.shape[-2]
    products = queries @ rows.flip(0).transpose(0, 1)  # (..., length, 2 * length - 1), by falling distance
    lead = products.shape[:-2]
    line = products.shape[-1]
    products = products.contiguous()
    strides = (*products.stride()[:-2], line - 1, 1)  # entry [i, j] stands at line i, column length - 1 - i + j
    return products.as_strided((*lead, length, length), strides, products.storage_offset() + length - 1)


def check_config(config: BertConfig) -> None:
    """Raises ValueError, naming the setting, for a config that this model cannot be built from."""
    position_type = getattr(config, "position_embedding_type", "absolute")
    if position_type not in RELATIVE_TYPES:
        raise ValueError(
            f"position_embedding_type is {position_type!r}, but RelativeBertForQuestionAnswering takes "
            f"{' or '.join(RELATIVE_TYPES)}" + (": use BertForQuestionAnswering" if position_type == "absolute" else "")
        )
    for setting in ("is_decoder", "add_cross_attention"):
        if getattr(config, setting, False):
            raise ValueError(f"{setting} is set, but BERT with relative positions is an encoder only: unset it")
    check_attention_implementation(config._attn_implementation)


def check_attention_implementation(attn_implementation) -> None:
    """Raises ValueError for an attention that cannot add the relative positions to the scores."""
    if attn_implementation is not None and attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation {attn_implementation!r} cannot take the bias of relative positions: "
            f"use {' or '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


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


RelativeBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
