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

# Added to the score of a masked key: finite in every dtype, also then, since softmax makes NaN of a line of infinities
MASKED_SCORE = torch.finfo(torch.float16).min / 2

# A CPU works on parts that stay in its cache.
GROUP_ELEMENTS = 5 * 2**18  # scores and queries of the heads in a part: 5 MB in float32
BLOCK_QUERIES = 64  # queries that share one product with the rows of their distances


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

        `start_positions`, `end_positions`: (batch,) int; one that is no token's leaves its window out of the loss.
        `position_ids` is taken as BERT takes it and changes nothing: a distance is that of two places in the input. The
        other inputs are those of `RelativeBertModel`, the last three those of every transformers model.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_attentions, output_hidden_states
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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks in this file for its own attention functions

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
        layers = (RelativeBertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The last layer's (batch, length, hidden); on demand also those before it, and each layer's probabilities.

        `input_ids`, `token_type_ids`: (batch, length) int; `inputs_embeds`, (batch, length, hidden), may stand for the
        former. `attention_mask`: (batch, length), nonzero where there is no padding; or one that broadcasts to (batch,
        heads, length, length), float and added to the scores, else nonzero where a query may see a key. Raises
        ValueError for both or neither of `input_ids` and `inputs_embeds`, for more tokens than max_position_embeddings,
        another shape of the mask, and `output_attentions` under sdpa.
        """
        output_attentions = chosen(output_attentions, self.config.output_attentions)
        output_hidden_states = chosen(output_hidden_states, self.config.output_hidden_states)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("sdpa keeps no probabilities for output_attentions: use attn_implementation eager")
        hidden = self.embeddings(input_ids, token_type_ids, inputs_embeds)  # (batch, length, hidden)
        mask = additive_mask(attention_mask, hidden)
        hidden_states, attentions = [hidden], []
        for layer in self.encoder["layer"]:
            hidden, probabilities = layer(hidden, mask, output_attentions)
            if output_hidden_states:
                hidden_states.append(hidden)
            if output_attentions:
                attentions.append(probabilities)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) or None,
        )


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
        """(batch, length, hidden) -> the same shape, and probabilities (batch, heads, length, length); None under sdpa.

        `mask` is added to the scores and broadcasts to (batch, heads, length, length).
        """
        batch, length, _ = hidden.shape
        heads = (batch, length, self.num_attention_heads, self.attention_head_size)
        # The scale goes into the queries and, for the keys' own term, into the rows: never over (length, length).
        query, key, value = (
            projected.view(heads).transpose(1, 2).flatten(0, 1)  # (batch * heads, length, head size)
            for projected in (self.query(hidden) * self.scaling, self.key(hidden), self.value(hidden))
        )
        first = self.max_position_embeddings - length  # the row of distance 1 - length
        rows = self.distance_embedding.weight[first : first + 2 * length - 1].to(query.dtype)
        query_rows = F.pad(rows.flip(0), (0, 0, 1, 0))  # by falling distance: the order of the keys
        key_rows = F.pad(rows * self.scaling, (0, 0, 1, 0))  # by rising distance: the order of the queries
        if mask is not None:
            mask = mask.to(query.dtype).expand(batch, self.num_attention_heads, -1, -1).flatten(0, 1)

        groups = head_groups(query, key, value, mask)
        contexts, probabilities = zip(*(self.attend(*group, query_rows, key_rows) for group in groups), strict=True)
        context = concatenate(contexts).unflatten(0, (batch, self.num_attention_heads))
        context = context.transpose(1, 2).reshape(batch, length, -1)
        if self.config._attn_implementation == "sdpa":
            return context, None
        return context, concatenate(probabilities).unflatten(0, (batch, self.num_attention_heads))

    def attend(self, query, key, value, mask, query_rows, key_rows):
        """Some heads' context (heads, length, head size), and probabilities (heads, length, length) or None under sdpa.

        `query` (scaled), `key` and `value` are (heads, length, head size), `mask` is None or broadcasts to (heads,
        length, length), the rows are as `relative_scores` takes them.
        """
        bias = relative_scores(query, query_rows)  # (heads, length, length)
        if self.position_embedding_type == "relative_key_query":
            bias = bias + relative_scores(key, key_rows).transpose(1, 2)
        if mask is not None:
            bias = bias + mask
        sdpa = self.config._attn_implementation == "sdpa"
        if sdpa and not on_cpu(bias):  # torch's kernels for a CPU are slower than the lines below
            heads = (-1, self.num_attention_heads)
            query, key, value, bias = (each.unflatten(0, heads) for each in (query, key, value, bias))
            bias = bias.contiguous()  # the kernels load 16 bytes at a time: a view may begin between two such places
            dropout = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=1.0)
            # Kernels differ in their order of memory: a graph must not keep a view that only one of them allows.
            return context.clone(memory_format=torch.contiguous_format).flatten(0, 1), None
        probabilities = self.dropout(torch.baddbmm(bias, query, key.transpose(1, 2)).softmax(-1))
        return probabilities @ value, None if sdpa else probabilities


def relative_scores(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores of each query with the row of its distance to each key; no (length, length, head size) tensor is made.

    `queries` (heads, length, head size), `rows` (2 * length, head size) with a first row that none takes. Returns
    (heads, length, length), where entry [i, j] is queries[i] · rows[length - i + j]: each query times all rows in use,
    then each line shifted by a view, as in Music Transformer (Huang et al. 2018).
    """
    length = queries.shape[1]
    blocks = [queries] if in_one_piece(queries) else queries.split(BLOCK_QUERIES, dim=1)
    scores, start = [], 0
    for block in blocks:
        stop = start + block.shape[1]
        products = block @ rows[length - stop : 2 * length - start].T  # (heads, queries, length + queries)
        scores.append(shift_lines(products))
        start = stop
    return concatenate(scores, 1)


def shift_lines(products: torch.Tensor) -> torch.Tensor:
    """A view of (heads, lines, length + lines) as (heads, lines, length): line i starts at column lines - i.

    Lines that end one element sooner begin one more element to the left each. No `as_strided`: that would write the
    sizes at hand into a trace.
    """
    heads, lines, width = products.shape
    return products.flatten(1)[:, lines:].view(heads, lines, width - 1)[..., : width - lines]


def head_groups(query, key, value, mask):
    """The same tensors, (batch * heads, ...) or None, in parts of as many heads as keep their scores in the cache."""
    if in_one_piece(query):
        return [(query, key, value, mask)]
    _, length, size = query.shape
    heads = max(1, GROUP_ELEMENTS // (length * (length + size)))
    queries, keys, values = (tensor.split(heads) for tensor in (query, key, value))
    masks = [None] * len(queries) if mask is None else mask.split(heads)
    return zip(queries, keys, values, masks, strict=True)


def in_one_piece(tensor: torch.Tensor) -> bool:
    """Parts are for a CPU's cache; a graph would keep the number of parts of the sizes that it was made with."""
    return not on_cpu(tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing()


def on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def concatenate(parts, dim: int = 0) -> torch.Tensor:
    """torch.cat, which would copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def chosen(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def additive_mask(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """What to add to the scores for an `attention_mask` that `RelativeBertModel` takes; None where it masks nothing."""
    if mask is None:
        return None
    if mask.dim() == 4 and mask.is_floating_point():
        return mask.clamp(min=MASKED_SCORE)
    batch, length, _ = hidden.shape
    if mask.dim() != 4:
        if mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but the input has {batch} sequences of {length} tokens"
                f": give it ({batch}, {length}), or 4 dimensions that broadcast to ({batch}, heads, {length}, {length})"
            )
        mask = mask[:, None, None, :]
    visible = mask.to(hidden.device, torch.bool)
    # A graph must not depend on what is in the mask.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and visible.all():
        return None
    return torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, MASKED_SCORE)


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
    if attn_implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"attn_implementation {attn_implementation!r} cannot take the bias of relative positions: use eager or sdpa"
        )


RelativeBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
