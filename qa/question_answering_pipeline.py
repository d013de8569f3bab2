"""transformers' question-answering pipeline, which transformers 5.3 removed, with this project's windows and answers.

`pipeline(model=folder, trust_remote_code=True)` imports this one file from beside the weights of a saved model; it
needs torch, transformers and what comes with them, in any version 5. The program itself makes its windows and picks its
answers by the functions here, so that both say the same.
"""

import inspect
import math
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch.nn import functional as F
from transformers.pipelines.base import ChunkPipeline

DEFAULTS = {  # where config.json does not say (as `qa_settings`) what the model was trained with
    "max_seq_len": 384,
    "doc_stride": 128,
    "max_question_len": 64,
    "n_best_size": 20,
    "max_answer_len": 30,
    "handle_impossible_answer": False,
    "null_score_diff_threshold": 0.0,
}
CONTEXTS_KEPT = 8  # whose tokens stay in memory for the next question
IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last white space
LARGEST_LOGIT = torch.finfo(torch.float32).max / 2  # the sum of two still is a float32
NO_SPAN = {"text": "", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0, "start": None, "end": None}


class QuestionAnsweringPipeline(ChunkPipeline):
    """Answers questions from texts of any length: `pipe(question="Who was she?", context=text)`.

    Returns {"answer", "score", "start", "end"}: score is the answer's probability among the `n_best_size` best ones,
    start and end count characters of the context, end exclusive; "" is no answer. A list of these for
    several questions, and instead of each a list, best first, for `top_k` above 1 (if there are as many).

    The settings, given here or with a call, are by default those that the model was trained with (see DEFAULTS):
    max_seq_len, doc_stride, max_question_len: tokens of a window, from one window's start to the next, of a question.
    n_best_size, max_answer_len: how many answers are compared, and the most tokens of one.
    handle_impossible_answer, null_score_diff_threshold: whether a question may have no answer; it has none where that
    scores higher than the best answer by more than the threshold.
    top_k, align_to_words: how many answers are returned; whether they are extended to whole words.
    batch_size: windows that the model takes at once.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    modelcard = None  # transformers 5.0 asks for it in save_pretrained

    def __init__(self, model, tokenizer, **settings):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets")
        super().__init__(model=model, tokenizer=tokenizer, **{**trained_settings(model.config), **settings})
        # pipeline() has put classes into it, with which it cannot be saved, and for a model of the hub its name.
        model.config.custom_pipelines = custom_pipelines()
        self.backend = plain_backend(tokenizer)
        self.template = pair_template(tokenizer)
        self.contexts: dict[str, Text] = {}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves model, tokenizer, this code, and the settings that the pipeline was made with."""
        made_with = {**self._preprocess_params, **self._forward_params, **self._postprocess_params}
        self.model.config.qa_settings = {name: made_with[name] for name in DEFAULTS}
        super().save_pretrained(save_directory, **kwargs)
        save_code(save_directory)

    def __call__(self, *examples, question=None, context=None, **settings):
        """Answers `question`, or several, from `context`, or from one each.

        In their place: a dict {"question", "context"} or a list, a generator or a torch dataset of these. Raises
        ValueError for a question or a context that is empty or no text.
        """
        if question is not None or context is not None:
            one_context = isinstance(context, str) or context is None
            questions = [question] if isinstance(question, str) or question is None else list(question)
            contexts = [context] * len(questions) if one_context else list(context)
            if len(questions) != len(contexts):
                raise ValueError(f"there are {len(questions)} questions, but {len(contexts)} contexts")
            examples = [[{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]]
        elif len(examples) == 2 and all(isinstance(each, str) for each in examples):
            examples = [[{"question": examples[0], "context": examples[1]}]]
        (inputs,) = examples if len(examples) == 1 else [list(examples)]
        if not isinstance(inputs, list | tuple):
            return super().__call__(inputs, **settings)
        for example in inputs:
            check_example(example)
        inputs = list(inputs)
        return super().__call__(inputs[0] if len(inputs) == 1 else inputs, **settings) if inputs else []

    def _sanitize_parameters(self, **settings):
        settings = {name: value for name, value in settings.items() if value is not None}
        if unknown := settings.keys() - DEFAULTS.keys() - {"top_k", "align_to_words"}:
            raise ValueError(f"there is no setting {', '.join(unknown)}")
        for name in ("max_seq_len", "doc_stride", "max_question_len", "n_best_size", "max_answer_len", "top_k"):
            if settings.get(name, 1) < 1:
                raise ValueError(f"{name} is {settings[name]}, must be 1 or more")
        longest = absolute_positions(self.model) if "max_seq_len" in settings else None
        if longest is not None and settings["max_seq_len"] > longest:
            raise ValueError(
                f"max_seq_len is {settings['max_seq_len']}, but the model has positions for {longest} tokens only"
            )
        steps = (self.preprocess, self._forward, self.postprocess)
        return tuple({n: settings[n] for n in inspect.signature(step).parameters if n in settings} for step in steps)

    def preprocess(self, example, max_seq_len, doc_stride, max_question_len) -> Iterator[dict]:
        """The windows of a question and its context, each as a batch of one."""
        check_example(example)
        context = self._context(example["context"])
        special_ids, special_types, bounds = self.template
        question_ids = self._encode(example["question"].lstrip()).ids[:max_question_len]
        before = bounds[3] + len(question_ids) - (bounds[2] - bounds[1])  # tokens before those of the context
        room = max_seq_len - before - (bounds[5] - bounds[4])
        if doc_stride > room:
            raise ValueError(
                f"doc_stride {doc_stride} would leave tokens of the context outside all windows: a question of "
                f"{len(question_ids)} tokens leaves {max(room, 0)} of max_seq_len {max_seq_len}; lower doc_stride"
            )

        def around(special, question, context):
            between = special[bounds[2] : bounds[3]]
            return np.concatenate([special[: bounds[1]], question, between, context, special[bounds[4] :]])

        question_types = np.full(len(question_ids), special_types[bounds[1]])
        _, starts, lengths = place_windows(np.array([len(context.ids)]), np.array([room]), doc_stride)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            ids = around(special_ids, question_ids, context.ids[start : start + length])
            window = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            if "token_type_ids" in self.tokenizer.model_input_names:
                context_types = np.full(length, special_types[bounds[3]])
                window["token_type_ids"] = around(special_types, question_types, context_types)
            window["bounds"] = [len(ids), before, before + length]
            window = {name: torch.tensor(values, dtype=torch.int64)[None] for name, values in window.items()}
            yield {**window, "context": context, "first_token": start - before, "is_last": start == starts[-1]}

    def _context(self, text: str) -> "Text":
        context = self.contexts.get(text)
        if context is None:
            encoding = self._encode(text)
            _, *arrays = token_arrays([text], [encoding])
            if len(self.contexts) == CONTEXTS_KEPT:
                self.contexts.clear()
            context = self.contexts[text] = Text(text, encoding, *arrays)
        return context

    def _encode(self, text: str) -> tokenizers.Encoding:
        text.encode()  # raises for half of a surrogate pair, of which the tokenizer says less
        return self.backend.encode(text, add_special_tokens=False)

    def _forward(self, windows, n_best_size, max_answer_len, handle_impossible_answer) -> dict:
        names = ("input_ids", "attention_mask", "token_type_ids")
        output = self.model(**{name: windows.pop(name) for name in names if name in windows})
        bounds = windows.pop("bounds")
        logits = (own_logits(each, bounds[:, :1], n_best_size) for each in (output.start_logits, output.end_logits))
        found = best_spans(*logits, bounds, n_best_size, max_answer_len, handle_impossible_answer)
        return {**found, **windows}

    def postprocess(self, windows, handle_impossible_answer, null_score_diff_threshold, top_k=1, align_to_words=False):
        """The answer, or the `top_k` best ones, from what `_forward` found in the windows of a question."""
        context = windows[0]["context"]
        names = ("start", "end", "start_logit", "end_logit", "score", "finite")
        *found, scores, finite = (torch.cat([window[name] for window in windows]).numpy() for name in names)
        if not finite.all():
            raise ValueError("the logits hold NaN or infinity: the model diverged, or overflowed in its dtype")
        row, rank = rank_spans(scores, np.zeros(len(scores), np.int64), handle_impossible_answer)
        start, end, start_logit, end_logit = (values[row, rank].tolist() for values in found)
        n_best = []
        for i, number in enumerate(row):
            is_null, first = rank[i] == scores.shape[1] - 1, windows[number]["first_token"]
            span = () if is_null else context.characters(first + start[i], first + end[i], align_to_words)
            n_best.append(n_best_entry(context.text, is_null, start_logit[i], end_logit[i], *span))
        threshold = null_score_diff_threshold if handle_impossible_answer else None
        n_best, answer, _, _ = choose_answer(n_best, scores[row, rank].tolist(), threshold)

        probabilities = Counter()  # a span that several windows see is one answer
        for entry in n_best:
            probabilities[entry["start"], entry["end"]] += entry["probability"]
        answers = [
            {"score": probability, "start": start or 0, "end": end or 0, "answer": context.text[start or 0 : end or 0]}
            for (start, end), probability in probabilities.most_common()
        ]
        answers.sort(key=lambda each: (each["start"], each["end"]) != (answer["start"] or 0, answer["end"] or 0))
        return answers[0] if min(top_k, len(answers)) == 1 else answers[:top_k]


def check_example(example) -> None:
    """Raises ValueError unless it is a dict with a question and a context that are text."""
    if not isinstance(example, dict):
        raise ValueError(f"a question is asked as a dict with question and context, not as {type(example).__name__}")
    for name in ("question", "context"):
        text = example.get(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{name}` is {'empty' if isinstance(text, str) else repr(text)[:80]}: give a text")


@dataclass
class Text:
    """A text and its tokens: ids, and the characters that each has in the text, end exclusive; all (tokens,) int32."""

    text: str
    encoding: tokenizers.Encoding
    ids: np.ndarray
    char_starts: np.ndarray
    char_ends: np.ndarray

    def characters(self, first: int, last: int, align_to_words: bool = False) -> tuple[int, int]:
        """Where the tokens from `first` to `last` start and end; with `align_to_words`, the words that they are in."""
        start, end = int(self.char_starts[first]), int(self.char_ends[last])
        first_word, last_word = self.encoding.token_to_word(first), self.encoding.token_to_word(last)
        if align_to_words and None not in (first_word, last_word):
            start = min(start, self.encoding.word_to_chars(first_word)[0])
            end = max(end, self.encoding.word_to_chars(last_word)[1])
            words = self.text[start:end]
            start, end = end - len(words.lstrip()), start + len(words.rstrip())
        return start, max(start, end)  # a span of white space alone ends before it starts


def trained_settings(config) -> dict:
    """The settings that a model was trained with, by its configuration; see DEFAULTS."""
    return {**DEFAULTS, **(getattr(config, "qa_settings", None) or {})}


def custom_pipelines() -> dict:
    """What config.json says, for `pipeline` to find the class here."""
    implementation = f"{Path(__file__).stem}.{QuestionAnsweringPipeline.__name__}"
    # Not question-answering, which before 5.3 is transformers' own and needs no trust_remote_code.
    return {"extractive-question-answering": {"impl": implementation, "pt": ["AutoModelForQuestionAnswering"]}}


def save_code(folder: str | Path) -> None:
    """Copies this file beside the weights of a model whose config.json names it."""
    shutil.copyfile(__file__, Path(folder, Path(__file__).name))


# ---- Texts to windows ----


def absolute_positions(model) -> int | None:
    """For how many tokens the model has a table of absolute positions; None where it has none (ModernBERT, T5)."""
    for name, module in model.base_model.named_modules():
        rows = getattr(module, "weight", None)
        leaf = name.rpartition(".")[2]
        if rows is not None and ("position" in leaf or leaf == "wpe"):
            padding_idx = getattr(module, "padding_idx", None)
            before = 0 if padding_idx is None else padding_idx + 1  # RoBERTa counts positions from there
            return min(len(rows), getattr(model.config, "max_position_embeddings", len(rows))) - before
    return None


def plain_backend(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the tokenizers library, which is faster when called itself, as one that neither cuts nor pads.

    Nor has it a post-processor: without special tokens to add, all that one does is to trim offsets, by rules that do
    not go with every pre-tokenizer. Shares the parts of the tokenizer, which stays as it is.
    """
    backend = tokenizer.backend_tokenizer
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = tokenizer.split_special_tokens
    return plain


def token_arrays(texts: list[str], encodings: list[tokenizers.Encoding]) -> tuple[list[int], *tuple[np.ndarray, ...]]:
    """(tokens of each text, ids, char_starts, char_ends): the tokens of all texts end to end, (num_tokens,) int32.

    char_starts, char_ends: the characters of each token in its text, end exclusive, without white space at both ends:
    combining marks that the tokenizer drops go with the letter before them; a token of white space alone starts at the
    next character that is none, and ends after the last one.
    """
    lengths = [len(encoding) for encoding in encodings]
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, sum(lengths))
    spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    starts, ends = np.fromiter(spans, np.int32, 2 * sum(lengths)).reshape(-1, 2).T
    starts, ends = _trim(texts, lengths, starts, ends)
    stops = np.cumsum(lengths)
    for number, text in enumerate(texts):
        if not text.isascii() and any(unicodedata.category(c)[0] == "M" for c in set(text)):
            here = slice(stops[number] - lengths[number], stops[number])
            _extend_over_marks(text, starts[here], ends[here])
    return lengths, ids, starts, ends


def _trim(texts: list[str], lengths: list[int], starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), moved on and back over white space, inside their texts, which have so many tokens (`lengths`)."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)  # (num_characters,) of all texts
    solid = ~IS_SPACE[np.minimum(codes, len(IS_SPACE) - 1)]
    places = np.flatnonzero(solid)
    passed = np.append(0, np.cumsum(solid))  # (num_characters + 1,): how many of `places` lie before each character
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    stop = np.repeat(np.cumsum(sizes), lengths)  # (num_tokens,), as is `begin`: of the token's text
    begin = stop - np.repeat(sizes, lengths)
    starts = np.minimum(np.append(places, len(codes))[passed[begin + starts]], stop) - begin
    ends = np.maximum(np.append(0, places + 1)[passed[begin + ends]], begin) - begin
    return starts.astype(np.int32), ends.astype(np.int32)


def _extend_over_marks(text: str, starts: np.ndarray, ends: np.ndarray) -> None:
    """Moves the ends of tokens behind the combining marks that follow and are in no token.

    A tokenizer that strips accents drops such marks, but a letter without its marks is not what the text says.
    """
    holding = starts < ends
    following = np.append(starts[holding], len(text))[np.searchsorted(starts[holding], ends)]
    for token in np.flatnonzero(holding & (ends < following)):
        while ends[token] < following[token] and unicodedata.category(text[ends[token]]).startswith("M"):
            ends[token] += 1


def pair_template(tokenizer) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(ids int32, types int8, bounds) of a short pair: bounds are where question and context start and end in it.

    What is neither, at both ends and between, are the special tokens that stand around every pair.
    """
    pair = tokenizer("a", "a", return_token_type_ids=True, return_attention_mask=False)
    text = np.array([-1 if index is None else index for index in pair.sequence_ids(0)])
    question, context = np.flatnonzero(text == 0).tolist(), np.flatnonzero(text == 1).tolist()
    bounds = [0, question[0], question[-1] + 1, context[0], context[-1] + 1, len(text)]
    return np.array(pair["input_ids"], np.int32), np.array(pair["token_type_ids"], np.int8), bounds


def place_windows(context_lengths, room, doc_stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(example, start, length) of each window: its row, first context token and number of these; (num_windows,) int64.

    Window i of an example starts at context token i * doc_stride; its last is the first that reaches the end.

    context_lengths: (num_examples,) tokens. room: (num_examples,) context tokens of a window, `doc_stride` or more.
    """
    num_windows = 1 + -(-np.maximum(context_lengths - room, 0) // doc_stride)  # (num_examples,)
    example = np.repeat(np.arange(len(num_windows)), num_windows)
    start = doc_stride * (np.arange(len(example)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows))
    return example, start, np.minimum(context_lengths[example] - start, room[example])


# ---- Logits to spans ----


def own_logits(logits: torch.Tensor, length: torch.Tensor, columns: int) -> torch.Tensor:
    """(batch, padded length or `columns`, if that is more) float32: -inf where no token of the window stands.

    logits: (batch, padded length), any float type. length: (batch, 1), the window's tokens.
    """
    more = max(columns - logits.shape[1], 0)
    outside = torch.arange(logits.shape[1] + more, device=logits.device) >= length
    return F.pad(logits.float(), (0, more)).masked_fill(outside, -math.inf)


def best_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    bounds: torch.Tensor,
    n: int,
    max_answer_length: int,
    null_answers: bool,
) -> dict[str, torch.Tensor]:
    """The `n` best spans of each window, and its null answer; runs where the logits are.

    The `n` best starts are combined with the `n` best ends. Spans inside the context, not reversed and of at most
    `max_answer_length` tokens, rank by `span_score`, equal ones by position.

    start_logits, end_logits: (batch, n columns or more), as `own_logits` gives them. bounds: (batch, 3), the window's
    tokens and the positions of the context's first token and after its last one.

    Returns start, end (int32, positions), start_logit, end_logit and score (float32), (batch, n + 1): the best spans,
    best first, of score -inf where there are no more, and in the last column the null answer, the first token. And
    finite, (batch,) bool: whether the logits can be used; not with -inf at the first token where `null_answers`.
    """
    finite = (start_logits.amax(dim=1) <= LARGEST_LOGIT) & (end_logits.amax(dim=1) <= LARGEST_LOGIT)  # not if NaN
    if null_answers:
        finite &= (start_logits[:, 0] >= -LARGEST_LOGIT) & (end_logits[:, 0] >= -LARGEST_LOGIT)

    context_start, context_end = bounds[:, 1, None], bounds[:, 2, None]
    start_logit, start = _largest(start_logits, n)  # (batch, n)
    end_logit, end = _largest(end_logits, n)
    more_tokens = end[:, None, :] - start[:, :, None]  # (batch, n, n): a row for each start, a column for each end
    is_span = (start >= context_start)[:, :, None] & (end < context_end)[:, None, :]
    is_span &= (more_tokens >= 0) & (more_tokens < max_answer_length)
    score = span_score(start_logit[:, :, None], end_logit[:, None, :]).masked_fill(~is_span, -math.inf)
    score, pair = _largest(score.flatten(1), n)
    start, end = start.gather(1, pair // n), end.gather(1, pair % n)

    start, end = F.pad(start, (0, 1)), F.pad(end, (0, 1))  # the null answer starts and ends at position 0
    start_logit, end_logit = start_logits.gather(1, start), end_logits.gather(1, end)
    score = torch.cat([score, span_score(start_logit[:, n:], end_logit[:, n:])], dim=1)
    logits = {"start_logit": start_logit, "end_logit": end_logit, "score": score}
    return {"start": start.int(), "end": end.int(), **logits, "finite": finite}


def span_score(start_logit: torch.Tensor, end_logit: torch.Tensor) -> torch.Tensor:
    """The score of spans or of null answers, by which they rank in their window, across windows and in probability.

    start_logit, end_logit: float32, of shapes that go together.
    """
    return start_logit + end_logit


def _largest(values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest float32 values of each row and their columns, descending; equal values by column."""
    # An integer that sorts like (value, lower column first) makes topk exact about ties, and is faster than a sort.
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # of negative floats, which sort the other way round as integers
    last = values.shape[1] - 1
    keys = bits.long() * 2**32 + torch.arange(last, -1, -1, device=values.device)
    columns = last - (keys.topk(n, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, columns), columns


# ---- Spans to answers ----


def rank_spans(scores: np.ndarray, question: np.ndarray, null_answers: bool) -> tuple[np.ndarray, np.ndarray]:
    """The n-best list of each question, best first, one after the other: (row, column) of `scores`, both (entries,).

    scores: (num_windows, n + 1), as `best_spans` returns them. question: (num_windows,) int, ascending. The null answer
    of a question is that of the window where it scores lowest; it is never cut off: where it ranks lower, it is one
    more. Without `null_answers` there is none.
    """
    n = scores.shape[1] - 1
    null_scores, scores = scores[:, n], scores.copy()
    scores[:, n] = -math.inf
    if null_answers:
        first = np.unique(question, return_index=True)[1]
        lowest = np.lexsort((null_scores, question))[first]
        scores[lowest, n] = null_scores[lowest]
    row, rank = np.nonzero(scores > -math.inf)
    # A stable sort: equal scores keep the order of windows and ranks, save that the null answer comes last.
    order = np.lexsort((rank == n, -scores[row, rank], question[row]))
    row, rank = row[order], rank[order]
    place = np.arange(len(row)) - np.searchsorted(question[row], question[row])
    listed = (place < n) | (rank == n)
    return row[listed], rank[listed]


def n_best_entry(
    context: str, is_null: bool, start_logit: float, end_logit: float, start: int = 0, end: int = 0
) -> dict:
    """An entry of an n-best list, its probability aside; start and end count characters of the context."""
    span = {"start": None, "end": None} if is_null else {"start": start, "end": end}
    text = "" if is_null else context[start:end]
    return {"text": text, "probability": None, "start_logit": start_logit, "end_logit": end_logit, **span}


def choose_answer(
    n_best: list[dict], scores: list[float], threshold: float | None
) -> tuple[list[dict], dict, dict, float | None]:
    """(n-best list, answer, best answer that is not empty, null odds) of a question; gives the list its probabilities.

    n_best: entries as `n_best_entry` makes them, best first. scores: theirs. The null odds are the score of the null
    answer minus that of the best other one; it is the answer where they exceed `threshold`, which is None where there
    is no null answer. Without any span the best answer is "" at logits 0.0.
    """
    null = next((rank for rank, entry in enumerate(n_best) if entry["start"] is None), None)
    best = next((rank for rank, entry in enumerate(n_best) if entry["text"]), None)
    if best is None:
        n_best, scores, best = [NO_SPAN.copy(), *n_best], [0.0, *scores], 0
        null = None if null is None else null + 1
    largest = max(scores)
    exps = [math.exp(score - largest) for score in scores]
    total = sum(exps)
    for entry, exp in zip(n_best, exps, strict=True):
        entry["probability"] = exp / total
    if threshold is None:
        return n_best, n_best[0], n_best[best], None
    null_odds = scores[null] - scores[best]
    return n_best, n_best[null if null_odds > threshold else best], n_best[best], null_odds
