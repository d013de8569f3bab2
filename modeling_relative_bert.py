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

GROUP_SCORES = 2**20  # scores of the heads that a CPU works on at a time: 4 MB in float32
KEPT_GROUPS = (3, 5)  # of 5 such groups 3 keep their probabilities for the gradient and 2 compute them again
BLOCK_QUERIES = 32  # queries that share one product with the rows of their distances


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
        """(batch, length, hidden) -> the same shape, and (batch, heads, length, length) probabilities under eager.

        `attention_mask` broadcasts to (batch, heads, length, length): bool, True where a query may see a key, or float
        and added to the scores.
        """
        batch, length, _ = hidden_states.shape
        heads = (batch, length, self.num_attention_heads, self.attention_head_size)
        # The scale goes into the queries and, for the keys' own term, into the rows: never over (length, length).
        query = (self.query(hidden_states) * self.scaling).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(heads).transpose(1, 2)  # (batch, heads, length, head size)
        value = self.value(hidden_states).view(heads).transpose(1, 2)

        first = self.max_position_embeddings - length  # the row of distance 1 - length
        rows = self.distance_embedding.weight[first : first + 2 * length - 1].to(query.dtype)
        query_rows = rows.flip(0)  # by falling distance: the order of the keys
        key_rows = rows * self.scaling if self.position_embedding_type == "relative_key_query" else None

        mask = additive_mask(attention_mask, query.dtype)
        implementation = self.config._attn_implementation
        dropout = self.dropout.p if self.training else 0.0
        if implementation == "sdpa" and query.device.type == "cpu" and not torch.compiler.is_compiling():
            inputs = (query, key, value, query_rows, key_rows)
            save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
            return RelativeAttention.apply(*inputs, mask, dropout, save).reshape(batch, length, -1), None

        bias = relative_scores(query, query_rows)  # (batch, heads, length, length)
        if key_rows is not None:
            bias = bias + relative_scores(key, key_rows).transpose(-1, -2)
        if mask is not None:
            bias = bias + mask
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, probabilities = attention(self, query, key, value, bias, dropout=dropout, scaling=1.0, **kwargs)
        return context.reshape(batch, length, -1), probabilities


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A bool mask as what to add to scores of `dtype`; half of the least number, so that adding cannot overflow."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)


def relative_scores(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores of each query with the row of its distance to each key; no (length, length, head size) tensor is made.

    `queries` (..., length, head size), `rows` (2 * length - 1, head size). Returns (..., length, length), where entry
    [i, j] is queries[i] · rows[length - 1 - i + j]: each query times all rows, then each line shifted by a strided
    view, as in Music Transformer (Huang et al. 2018).
    """
    return shift_lines(queries @ rows.T, queries.shape[-2])


def shift_lines(products: torch.Tensor, length: int) -> torch.Tensor:
    """A view of (..., lines, width) as (..., lines, length): line i starts at column lines - 1 - i."""
    *lead, lines, width = products.shape
    strides = (*products.stride()[:-2], width - 1, 1)
    return products.as_strided((*lead, lines, length), strides, products.storage_offset() + lines - 1)


# Relative attention on a CPU: a few heads at a time, whose scores stay in the cache


class RelativeAttention(torch.autograd.Function):
    """softmax(q·k + q·query_rows [+ k·key_rows]) v with dropout of the probabilities, and its gradient.

    `query` (scaled), `key`, `value` (batch, heads, length, head size); `query_rows`, and `key_rows` or None,
    (2 * length - 1, head size) as `relative_scores` takes them. Returns (batch, length, heads, head size). The gradient
    of the scores is made once and serves queries, keys and rows. `save`: keep what the gradient needs.
    """

    @staticmethod
    def forward(ctx, query, key, value, query_rows, key_rows, mask, dropout, save):
        batch, heads, length, size = query.shape
        context = query.new_empty(batch, length, heads, size).transpose(1, 2)
        if mask is not None:
            mask = mask.expand(batch, heads, length, length)
        kept = []  # for each group of heads its probabilities or None, and which of them dropout has spared
        for number, group in enumerate(head_groups(query)):
            probabilities = group_probabilities(group, query, key, query_rows, key_rows, mask)
            if save:
                kept.append(probabilities if number % KEPT_GROUPS[1] < KEPT_GROUPS[0] else None)
            if dropout > 0:
                probabilities, spared = torch.native_dropout(probabilities, dropout, True)
                if save:
                    kept.append(spared)
            context[group] = probabilities @ value[group]
        ctx.dropout = dropout
        ctx.save_for_backward(query, key, value, query_rows, key_rows, mask, context, *kept)
        return context.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, context_grad):
        query, key, value, query_rows, key_rows, mask, context, *kept = ctx.saved_tensors
        context_grad = context_grad.transpose(1, 2)
        query_grad, key_grad, value_grad = (torch.empty_like(tensor) for tensor in (query, key, value))
        query_rows_grad = torch.zeros_like(query_rows)
        key_rows_grad = None if key_rows is None else torch.zeros_like(key_rows)
        kept = iter(kept)
        for group in head_groups(query):
            probabilities = next(kept)
            if probabilities is None:
                probabilities = group_probabilities(group, query, key, query_rows, key_rows, mask)
            scores_grad = context_grad[group] @ value[group].transpose(-1, -2)  # of the probabilities, until below
            if ctx.dropout > 0:
                spared = next(kept)
                scale = 1 / (1 - ctx.dropout)
                scores_grad.mul_(spared).mul_(scale)
                value_grad[group] = (probabilities * spared).transpose(-1, -2) @ (context_grad[group] * scale)
            else:
                value_grad[group] = probabilities.transpose(-1, -2) @ context_grad[group]
            # Through the softmax; the mean over the keys of the probabilities' gradient is context · its gradient.
            scores_grad.sub_((context_grad[group] * context[group]).sum(-1, keepdim=True)).mul_(probabilities)
            query_grad[group] = scores_grad @ key[group]
            key_grad[group] = scores_grad.transpose(-1, -2) @ query[group]
            add_relative_gradients_(query_grad[group], query_rows_grad, scores_grad, query[group], query_rows)
            if key_rows is not None:
                scores_grad = scores_grad.transpose(-1, -2)
                add_relative_gradients_(key_grad[group], key_rows_grad, scores_grad, key[group], key_rows)
        return query_grad, key_grad, value_grad, query_rows_grad, key_rows_grad, None, None, None


def group_probabilities(group, query, key, query_rows, key_rows, mask) -> torch.Tensor:
    """The attention probabilities of one of `head_groups`, before dropout: (heads of the group, length, length)."""
    scores = query[group] @ key[group].transpose(-1, -2)
    add_relative_scores_(scores, query[group], query_rows)
    if key_rows is not None:
        add_relative_scores_(scores.transpose(-1, -2), key[group], key_rows)
    if mask is not None:
        scores += mask[group]
    return scores.softmax(-1)


def head_groups(query: torch.Tensor):
    """Indices of (batch, heads, ...) that take one sequence's heads, as many as keep their scores near the cache."""
    batch, heads, length, _ = query.shape
    size = max(1, min(heads, GROUP_SCORES // length**2))
    for sequence in range(batch):
        for start in range(0, heads, size):
            yield sequence, slice(start, start + size)


def query_blocks(length: int):
    """Blocks of queries, each with the rows that it can see: (slice of queries, slice of rows)."""
    for start in range(0, length, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, length)
        yield slice(start, stop), slice(length - stop, 2 * length - 1 - start)


def add_relative_scores_(scores: torch.Tensor, queries: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds `relative_scores(queries, rows)` to `scores` (heads, length, length), a block of queries at a time."""
    length = queries.shape[1]
    for block, seen in query_blocks(length):
        scores[:, block] += shift_lines(queries[:, block] @ rows[seen].T, length)


def add_relative_gradients_(queries_grad, rows_grad, scores_grad, queries, rows) -> None:
    """Adds what `scores_grad` (heads, length, length) gives to the gradients of the queries and rows of the above."""
    heads, length, size = queries.shape
    for block, seen in query_blocks(length):
        lines = block.stop - block.start
        if block.start == 0 or lines < BLOCK_QUERIES:
            products_grad = queries.new_zeros(heads, lines, length + lines - 1)  # zero where no key is
        shift_lines(products_grad, length).copy_(scores_grad[:, block])
        queries_grad[:, block] += products_grad @ rows[seen]
        rows_grad[seen].addmm_(products_grad.flatten(0, 1).T, queries[:, block].reshape(heads * lines, size))


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
