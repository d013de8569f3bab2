"""BERT for question answering with relative position embeddings (Shaw et al. 2018; Huang et al. 2020, method 4).

This one file is all that a saved model needs besides transformers: `save_pretrained` copies it beside the weights, and
`AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)` imports it from there. It holds the
whole model, and takes from transformers only what is the same in all of 5, so that it runs in whichever its user has.

In shapes, length is the number of tokens, hidden is hidden_size, and head size is hidden / heads.
"""

import torch
import transformers
from torch import nn
from torch.nn import functional as F

if transformers.__version__.startswith("4."):  # before the imports that 4 does not have
    raise ImportError(
        "this file is for transformers 5; 4 has relative positions of its own: load without trust_remote_code"
    )

from transformers import BertConfig, GradientCheckpointingLayer, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput

RELATIVE_TYPES = ("relative_key", "relative_key_query")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")

GROUP_ELEMENTS = 5 * 2**18  # scores and queries of the heads that a CPU works on at a time: 5 MB in float32
KEPT_GROUPS = (3, 5)  # of 5 such groups 3 keep their probabilities for the gradient and 2 compute them again
BLOCK_QUERIES = 32  # queries that share one product with the rows of their distances
ROWS_MULTIPLE = 8  # that product is much slower with a number of rows that is not a multiple of this


class RelativeBertForQuestionAnswering(PreTrainedModel):
    """BERT with relative positions and a span head: inputs, outputs and parameter names of BertForQuestionAnswering.

    `config` is a BertConfig that carries `position_embedding_type` (relative_key or relative_key_query). Raises
    ValueError for another type, a decoder or cross-attention config, or an attention that cannot take a bias.
    """

    config_class = BertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["RelativeBertEmbeddings", "RelativeBertLayer"]

    def __init__(self, config: BertConfig):
        check_config(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = RelativeBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Start and end logits, (batch, length) each, and the mean of their losses where both positions are given.

        `start_positions`, `end_positions`: (batch,) int; one that is no token's leaves its window out of the loss. The
        other inputs are those of `RelativeBertModel`, the last three those of every transformers model.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        logits = self.qa_outputs(outputs.last_hidden_state)  # (batch, length, 2)
        start_logits, end_logits = (each.squeeze(-1).contiguous() for each in logits.split(1, dim=-1))

        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]
            losses = []
            for each_logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
                positions = positions.reshape(-1).clamp(0, length)  # DataParallel hands over (batch, 1)
                losses.append(F.cross_entropy(each_logits, positions, ignore_index=length))
            loss = sum(losses) / 2

        result = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if chosen(return_dict, self.config.return_dict) else result.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.bert.embeddings.word_embeddings = value

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        check_attention_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info a pair
        model.bert.embeddings.position_embeddings.requires_grad_(False)  # loading has put a new parameter in place
        return loaded

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        # In a file by Google the LayerNorms have other names, which transformers would give them again.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        # The name by which transformers 4 finds the architecture; its own BERT reads position_embedding_type.
        self.config.architectures = ["BertForQuestionAnswering"]
        if is_main_process:
            self.config.save_pretrained(save_directory)


class RelativeBertModel(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = RelativeBertEmbeddings(config)
        self.encoder = RelativeBertEncoder(config)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The last layer's (batch, length, hidden); on demand also those before it, and each layer's probabilities.

        `input_ids`, `token_type_ids`: (batch, length) int; `inputs_embeds`, (batch, length, hidden), may stand for the
        former. `attention_mask`: (batch, length), nonzero where there is no padding; or one that broadcasts to (batch,
        heads, length, length), float and added to the scores, else nonzero where a query may see a key. `position_ids`
        is taken as BERT takes it and changes nothing: a distance is that of two places in the input. Raises ValueError
        for both or neither of `input_ids` and `inputs_embeds`, for more tokens than max_position_embeddings, another
        shape of the mask, and `output_attentions` under sdpa.
        """
        output_attentions = chosen(output_attentions, self.config.output_attentions)
        output_hidden_states = chosen(output_hidden_states, self.config.output_hidden_states)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("sdpa keeps no probabilities for output_attentions: use attn_implementation eager")
        hidden = self.embeddings(input_ids, token_type_ids, inputs_embeds)  # (batch, length, hidden)
        mask = expanded_mask(attention_mask, hidden)
        hidden, hidden_states, attentions = self.encoder(hidden, mask, output_attentions, output_hidden_states)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=hidden_states, attentions=attentions)


class RelativeBertEmbeddings(nn.Module):
    """Word and token type embeddings. The absolute ones stay for the checkpoint's sake, neither added nor trained."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_embeddings.requires_grad_(False)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids=None, token_type_ids=None, inputs_embeds=None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (batch, length, hidden)
        length, max_length = inputs_embeds.shape[1], self.position_embeddings.num_embeddings
        if length > max_length:
            raise ValueError(
                f"sequence of {length} tokens, but max_position_embeddings is {max_length}: shorten the input"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        return self.dropout(self.LayerNorm(inputs_embeds + self.token_type_embeddings(token_type_ids)))


class RelativeBertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(RelativeBertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden, mask, output_attentions: bool, output_hidden_states: bool):
        hidden_states, attentions = [hidden], []
        for layer in self.layer:
            hidden, probabilities = layer(hidden, mask, output_attentions)
            if output_hidden_states:
                hidden_states.append(hidden)
            if output_attentions:
                attentions.append(probabilities)
        return hidden, tuple(hidden_states) if output_hidden_states else None, tuple(attentions) or None


class RelativeBertLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each added to its input and normalized after it."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = RelativeBertAttention(config)
        self.intermediate = RelativeBertIntermediate(config)
        self.output = RelativeBertOutput(config, config.intermediate_size)

    def forward(self, hidden, mask=None, output_attentions: bool = False):
        attended, probabilities = self.attention(hidden, mask)
        hidden = self.output(self.intermediate(attended), attended)  # (batch, length, hidden)
        return hidden, probabilities if output_attentions else None


class RelativeBertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = RelativeBertSelfAttention(config)
        self.output = RelativeBertOutput(config, config.hidden_size)

    def forward(self, hidden, mask=None):
        context, probabilities = self.self(hidden, mask)
        return self.output(context, hidden), probabilities


class RelativeBertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden):
        return self.activation(self.dense(hidden))  # (batch, length, intermediate size)


class RelativeBertOutput(nn.Module):
    """What ends both halves of a layer: back to (batch, length, hidden), dropout, the half's input added, LayerNorm."""

    def __init__(self, config: BertConfig, size: int):
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class RelativeBertSelfAttention(nn.Module):
    """Self-attention with a learned embedding e of the distance i - j from key j to query i.

    Scores before the softmax are (q_i·k_j + q_i·e_{i-j} [+ k_j·e_{i-j}]) / sqrt(head size), the last term for
    relative_key_query. Row i - j + max_position_embeddings - 1 of `distance_embedding` holds e_{i-j}.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.position_embedding_type = config.position_embedding_type
        self.max_position_embeddings = config.max_position_embeddings
        self.distance_embedding = nn.Embedding(2 * config.max_position_embeddings - 1, self.attention_head_size)

    def forward(self, hidden, mask=None):
        """(batch, length, hidden) -> the same shape, and (batch, heads, length, length) probabilities under eager.

        `mask` broadcasts to (batch, heads, length, length): bool, True where a query may see a key, or float and added
        to the scores.
        """
        batch, length, _ = hidden.shape
        heads = (batch, length, self.num_attention_heads, self.attention_head_size)
        # The scale goes into the queries and, for the keys' own term, into the rows: never over (length, length).
        query = (self.query(hidden) * self.scaling).view(heads).transpose(1, 2)
        key = self.key(hidden).view(heads).transpose(1, 2)  # (batch, heads, length, head size)
        value = self.value(hidden).view(heads).transpose(1, 2)

        first = self.max_position_embeddings - length  # the row of distance 1 - length
        rows = self.distance_embedding.weight[first : first + 2 * length - 1].to(query.dtype)
        query_rows = rows.flip(0)  # by falling distance: the order of the keys
        key_rows = rows * self.scaling if self.position_embedding_type == "relative_key_query" else None

        mask = additive_mask(mask, query.dtype)
        sdpa = self.config._attn_implementation == "sdpa"
        dropout = self.dropout.p if self.training else 0.0
        if sdpa and query.device.type == "cpu" and not torch.compiler.is_compiling() and not fits_cache(query):
            inputs = (query, key, value, query_rows, key_rows)
            save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
            return RelativeAttention.apply(*inputs, mask, dropout, save).reshape(batch, length, -1), None

        bias = relative_scores(query, query_rows)  # (batch, heads, length, length)
        if key_rows is not None:
            bias = bias + relative_scores(key, key_rows).transpose(-1, -2)
        if mask is not None:
            bias = bias + mask
        if sdpa:
            probabilities = None
            bias = aligned_rows(bias)
            context = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=1.0)
        else:
            probabilities = F.dropout((query @ key.transpose(-1, -2) + bias).softmax(-1), dropout)
            context = probabilities @ value  # (batch, heads, length, head size)
        return context.transpose(1, 2).reshape(batch, length, -1), probabilities


def chosen(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def expanded_mask(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """`attention_mask` as the layers take it, for `hidden` (batch, length, hidden); None where nothing is padding."""
    if mask is None:
        return None
    batch, length, _ = hidden.shape
    if mask.dim() == 4:
        return mask if mask.is_floating_point() else mask.bool()
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the input has {batch} sequences of {length} tokens: "
            f"give it ({batch}, {length}), or four dimensions that broadcast to ({batch}, heads, {length}, {length})"
        )
    mask = mask.to(hidden.device, torch.bool)
    # A graph must not depend on what is in the mask.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and mask.all():
        return None
    return mask[:, None, None, :]  # (batch, 1, 1, length)


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as what to add to scores of `dtype`; at least half of the least number, so that adding cannot overflow."""
    if mask is None:
        return None
    least = torch.finfo(dtype).min / 2
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, least)
    return mask.clamp(min=least).to(dtype)


def aligned_rows(bias: torch.Tensor) -> torch.Tensor:
    """The same (..., length, length) in rows that start 8 elements or a multiple of it apart.

    torch's memory-efficient kernel loads 16 bytes at a time (its checks: mem_eff_attention/kernel_forward.h), and takes
    no bias with other strides, such as the view that `relative_scores` returns.
    """
    length = bias.shape[-1]
    if length % 8:
        return F.pad(bias, (0, -length % 8))[..., :length]
    return bias.contiguous()


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


# Relative attention on a CPU: some heads at a time, whose scores stay in the cache


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
        query_rows, key_rows = padded_rows(query_rows), padded_rows(key_rows)
        kept = []  # for each group of heads its probabilities or None, and which of them dropout has spared
        for number, group in enumerate(head_groups(query)):
            probabilities = group_probabilities(group, query, key, query_rows, key_rows, mask)
            if save:
                kept.append(probabilities if number % KEPT_GROUPS[1] < KEPT_GROUPS[0] else None)
            if dropout > 0:
                probabilities, spared = torch.native_dropout(probabilities, dropout, True)
                if save:
                    kept.append(spared)
            put(context, group, probabilities @ take(value, group))
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
            queries, keys, output, output_grad = (take(each, group) for each in (query, key, context, context_grad))
            scores_grad = output_grad @ take(value, group).transpose(-1, -2)  # of the probabilities, until below
            # Through the softmax; the mean over the keys of the probabilities' gradient is output · its gradient.
            mean = (output_grad * output).sum(-1, keepdim=True)
            if ctx.dropout > 0:
                spared = next(kept)
                scale = 1 / (1 - ctx.dropout)
                scores_grad.mul_(spared).mul_(scale)
                put(value_grad, group, (probabilities * spared).transpose(-1, -2) @ (output_grad * scale))
            else:
                put(value_grad, group, probabilities.transpose(-1, -2) @ output_grad)
            scores_grad.sub_(mean).mul_(probabilities)
            queries_grad = scores_grad @ keys
            add_relative_gradients_(queries_grad, query_rows_grad, scores_grad, queries, query_rows)
            put(query_grad, group, queries_grad)
            scores_grad = scores_grad.transpose(-1, -2)
            keys_grad = scores_grad @ queries
            if key_rows is not None:
                add_relative_gradients_(keys_grad, key_rows_grad, scores_grad, keys, key_rows)
            put(key_grad, group, keys_grad)
        num_rows = 2 * query.shape[2] - 1
        query_rows_grad = query_rows_grad[:num_rows]
        key_rows_grad = None if key_rows is None else key_rows_grad[:num_rows]
        return query_grad, key_grad, value_grad, query_rows_grad, key_rows_grad, None, None, None


def fits_cache(query: torch.Tensor) -> bool:
    """Whether all heads together make one of `head_groups`, and one of `query_blocks`: then there is nothing to cut."""
    batch, heads, length, _ = query.shape
    return length <= BLOCK_QUERIES and batch * heads <= heads_of_a_group(query)


def heads_of_a_group(query: torch.Tensor) -> int:
    """How many heads' scores and queries stay near the cache; 0 where those of one are too much."""
    _, _, length, size = query.shape
    return GROUP_ELEMENTS // (length * (length + size))


def head_groups(query: torch.Tensor):
    """Indices of (batch, heads, ...) that take as many heads as keep their scores near the cache.

    Those are all heads of one sequence or several, or where that is too much, some heads of one.
    """
    batch, heads, _, _ = query.shape
    size = max(1, heads_of_a_group(query))
    sequences = max(1, size // heads)
    for sequence in range(0, batch, sequences):
        for head in range(0, heads, size):
            yield slice(sequence, sequence + sequences), slice(head, head + size)


def take(tensor: torch.Tensor, group) -> torch.Tensor:
    """A group's part of (batch, heads, length, ...) as (heads of the group, length, ...), a view where that can be."""
    return tensor[group].flatten(0, 1)


def put(tensor: torch.Tensor, group, values: torch.Tensor) -> None:
    """Writes a group's (heads of the group, length, ...) into (batch, heads, length, ...)."""
    part = tensor[group]
    part.copy_(values.view(part.shape))


def group_probabilities(group, query, key, query_rows, key_rows, mask) -> torch.Tensor:
    """The attention probabilities of one of `head_groups`, before dropout: (heads of the group, length, length)."""
    queries, keys = take(query, group), take(key, group)
    heads, length, _ = queries.shape
    scores = queries.new_empty(heads, length, length)
    for block, products in relative_products(queries, query_rows):
        scores[:, block] = products
    if key_rows is not None:
        for block, products in relative_products(keys, key_rows):
            scores.transpose(-1, -2)[:, block] += products
    if mask is not None:
        part = mask[group]
        scores.view(part.shape).add_(part)
    return scores.baddbmm_(queries, keys.transpose(-1, -2)).softmax(-1)


def query_blocks(length: int):
    """Blocks of queries, each with the rows that it can see and some more: (slice of queries, slice of rows)."""
    for start in range(0, length, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, length)
        seen = length + stop - start - 1
        yield slice(start, stop), slice(length - stop, length - stop + seen + -seen % ROWS_MULTIPLE)


def padded_rows(rows: torch.Tensor | None) -> torch.Tensor | None:
    """With rows of zeros at the end for the last of `query_blocks`."""
    return None if rows is None else F.pad(rows, (0, 0, 0, ROWS_MULTIPLE - 1))


def relative_products(queries: torch.Tensor, rows: torch.Tensor):
    """`relative_scores(queries, rows)`, (heads, length, length), a block of queries at a time: (slice, scores)."""
    for block, seen in query_blocks(queries.shape[1]):
        yield block, shift_lines(queries[:, block] @ rows[seen].T, queries.shape[1])


def add_relative_gradients_(queries_grad, rows_grad, scores_grad, queries, rows) -> None:
    """Adds what `scores_grad` (heads, length, length) gives to the gradients of the queries and rows of the above."""
    heads, length, size = queries.shape
    for block, seen in query_blocks(length):
        lines = block.stop - block.start
        if block.start == 0 or lines < BLOCK_QUERIES:
            products_grad = queries.new_zeros(heads, lines, seen.stop - seen.start)  # zero where no key is
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
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size is {config.hidden_size}, not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    check_attention_implementation(config._attn_implementation)


def check_attention_implementation(attn_implementation) -> None:
    """Raises ValueError for an attention that cannot add the relative positions to the scores."""
    if attn_implementation is not None and attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation {attn_implementation!r} cannot take the bias of relative positions: "
            f"use {' or '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


RelativeBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
