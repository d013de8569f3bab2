"""What this project costs, beside what it replaces. Each subcommand prints a table and can write its rows as JSON.

python scripts/benchmark.py attention [--sizes toy base large] [--lengths 384x4 ...] [--repeats 8] [--json FILE]
python scripts/benchmark.py data [--questions 87599] [--repeats 3] [--json FILE]
python scripts/benchmark.py training [--size base] [--questions 20000] [--batches 8] [--repeats 3] [--json FILE]
python scripts/benchmark.py scale [--contracts 1 4 16] [--json FILE]
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import string
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_attention_command(commands)
    add_data_command(commands)
    add_training_command(commands)
    add_scale_command(commands)
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        write_rows(args.json, rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(temporary, path)


# Relative against absolute positions, one BERT layer


# size -> (hidden size, heads, intermediate size), and lengths x batch sizes; toy is what the quickstart trains
ATTENTION_SHAPES = {
    "toy": ((128, 8, 256), ["28x32"]),
    "base": ((768, 12, 3072), ["48x32", "160x10", "384x4", "512x4"]),
    "large": ((1024, 16, 4096), ["160x10", "384x4", "512x4"]),
}


def add_attention_command(commands) -> None:
    parser = commands.add_parser(
        "attention",
        help="one BERT layer with relative positions: ours, the plain formula, absolute positions under sdpa",
    )
    parser.add_argument("--sizes", nargs="+", choices=ATTENTION_SHAPES, default=list(ATTENTION_SHAPES))
    parser.add_argument("--lengths", nargs="+", help="length x batch size (those that the size is used with)")
    parser.add_argument("--passes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    parser.add_argument("--dropout", type=float, default=0.0, help="of the probabilities, in training (%(default)s)")
    parser.add_argument("--repeats", type=int, default=8, help="timed rounds, after one that is not (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.set_defaults(run=measure_attention)


def measure_attention(args: argparse.Namespace) -> list[dict]:
    """A row for each size, length, position type and pass: medians in seconds and peak memory in bytes."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{'':36}{'seconds':>30}{'ratio':>26}{'peak MB':>30}")
    heads = "".join(f"{head:>10}" for head in ("ours", "absolute", "reference"))
    print(f"{'':36}{heads}{'ours/abs':>9}{'ref/abs':>8}{'ours/ref':>9}{heads}{'added':>8}")
    rows = []
    for size in args.sizes:
        for length, batch in (map(int, shape.split("x")) for shape in args.lengths or ATTENTION_SHAPES[size][1]):
            for kind in args.passes:
                layers = make_layers(size, length, args.dropout, device, dtype)
                hidden = torch.randn(batch, length, layers["absolute"].attention.output.dense.in_features)
                hidden = hidden.to(device, dtype).requires_grad_(kind == "train")
                steps = {key: make_step(layer, hidden, kind) for key, layer in layers.items()}
                seconds = alternate(steps, args.repeats, device)
                peaks = {key: peak_memory(step, device) for key, step in steps.items()}
                for position_type in ("relative_key", "relative_key_query"):
                    keys = {"ours": position_type, "absolute": "absolute", "reference": f"{position_type} reference"}
                    row = {"what": f"{position_type} {length} {kind}", "size": size, "batch": batch, "device": name}
                    row |= {f"{who}_s": seconds[key] for who, key in keys.items()}
                    row |= {f"{who}_peak_bytes": peaks[key] for who, key in keys.items()}
                    rows.append(row)
                    print_row(row)
    return rows


def print_row(row: dict) -> None:
    ours, absolute, reference = (row[f"{who}_s"] for who in ("ours", "absolute", "reference"))
    peaks = [row[f"{who}_peak_bytes"] for who in ("ours", "absolute", "reference")]
    # What relative positions add, as a share of what the reference adds.
    added = (peaks[0] - peaks[1]) / max(1, peaks[2] - peaks[1])
    print(
        f"{row['what'] + ' x' + str(row['batch']) + ' ' + row['size']:<36}{ours:10.4f}{absolute:10.4f}{reference:10.4f}"
        f"{ours / absolute:9.3f}{reference / absolute:8.3f}{ours / reference:9.3f}"
        + "".join(f"{peak / 1e6:10.0f}" for peak in peaks)
        + f"{added:8.2f}",
        flush=True,
    )


def make_layers(size: str, length: int, dropout: float, device, dtype) -> dict:
    """One transformers BertLayer for absolute positions, and for each relative type ours and the reference."""
    import torch
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    from qa.modeling_relative_bert import RelativeBertLayer

    hidden, heads, intermediate = ATTENTION_SHAPES[size][0]
    layers = {}
    for position_type in ("absolute", "relative_key", "relative_key_query"):
        config = BertConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=max(512, length),
            position_embedding_type=position_type,
            attn_implementation="sdpa",
        )
        layers[position_type] = BertLayer(config) if position_type == "absolute" else RelativeBertLayer(config)
        if position_type != "absolute":
            layers[f"{position_type} reference"] = RelativeBertLayer(config)
            layers[f"{position_type} reference"].attention.self = make_reference_attention(config)
    weights = layers["relative_key"].state_dict()
    for layer in layers.values():
        layer.load_state_dict(weights, strict=False)
        layer.to(device, dtype)
    torch.manual_seed(0)
    return layers


def make_reference_attention(config):
    """The formula as it reads, over a gathered (length, length, head size) tensor of distance embeddings."""
    import torch

    from qa.modeling_relative_bert import RelativeBertSelfAttention

    class ReferenceSelfAttention(RelativeBertSelfAttention):
        def forward(self, hidden_states, attention_mask=None):
            batch, length, _ = hidden_states.shape
            heads = (batch, length, self.num_attention_heads, self.attention_head_size)
            query = self.query(hidden_states).view(heads).transpose(1, 2)  # (batch, heads, length, head size)
            key = self.key(hidden_states).view(heads).transpose(1, 2)
            value = self.value(hidden_states).view(heads).transpose(1, 2)
            positions = torch.arange(length, device=query.device)
            rows = positions[:, None] - positions + self.max_position_embeddings - 1
            distances = self.distance_embedding(rows)  # (length, length, head size)
            scores = query @ key.transpose(-1, -2) + torch.einsum("bhld,lrd->bhlr", query, distances)
            if self.position_embedding_type == "relative_key_query":
                scores = scores + torch.einsum("bhrd,lrd->bhlr", key, distances)
            scores = scores / math.sqrt(self.attention_head_size)
            if attention_mask is not None:
                scores = scores + attention_mask
            probabilities = self.dropout(scores.softmax(-1))
            return (probabilities @ value).transpose(1, 2).reshape(batch, length, -1), probabilities

    return ReferenceSelfAttention(config)


def make_step(layer, hidden, kind: str):
    """A call of no arguments: one forward pass without gradients, or forward and backward with dropout."""
    import torch

    if kind == "forward":
        layer.eval()

        def step():
            with torch.no_grad():
                layer(hidden)
    else:
        layer.train()

        def step():
            layer_output(layer, hidden).sum().backward()
            layer.zero_grad()
            hidden.grad = None

    return step


def layer_output(layer, hidden):
    """(batch, length, hidden): all that transformers' layer returns, the first of what ours does."""
    output = layer(hidden)
    return output[0] if isinstance(output, tuple) else output


def alternate(steps: dict, repeats: int, device) -> dict[str, float]:
    """The median seconds of each step. One round calls each once, so that whatever else the machine does hits all."""
    import torch

    times = {key: [] for key in steps}
    for repeat in range(repeats + 1):
        for key, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(each) for key, each in times.items()}


def peak_memory(step, device) -> int:
    """The most bytes allocated at one time during `step`, above what was allocated before."""
    import torch

    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


# Text to windows, logits to answers, answers to scores


SQUAD_QUESTIONS = {"train": 87_599, "validation": 10_570}
QUESTIONS_PER_PARAGRAPH = {"train": 4.6, "validation": 5.1}
GOLD_ANSWERS = {"train": 1, "validation": 3}


def add_data_command(commands) -> None:
    parser = commands.add_parser(
        "data", help="features, post-processing and metric on text of SQuAD's shape: ours and in the way of run_qa.py"
    )
    parser.add_argument("--questions", type=int, help="in training; evaluation shrinks alike (SQuAD has 87599)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.set_defaults(run=measure_data)


def measure_data(args: argparse.Namespace) -> list[dict]:
    """A row for each part of the data path: medians in seconds, their ratio, and the peak memory of our whole path."""
    import datasets

    datasets.disable_progress_bars()
    share = min(1.0, (args.questions or SQUAD_QUESTIONS["train"]) / SQUAD_QUESTIONS["train"])
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = write_squad_shaped_files(Path(folder), share)
        (Path(folder) / "vocabulary.json").write_text(json.dumps(vocabulary))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as executor:  # a process of its own: peak memory never falls again
            peak = executor.submit(run_data_path, folder).result()
        rows = list(time_data_path(folder, args.repeats))
    print(f"peak memory of reading, features, post-processing and metric in one process: {peak / 1e9:.2f} GB")
    return [row | {"peak_bytes": peak} for row in rows]


def open_squad_shaped(folder: str):
    """(tokenizer, {split: examples}) of what `write_squad_shaped_files` has written."""
    from transformers import BertTokenizer

    from qa.read_squad import read_squad_file

    vocabulary = json.loads(Path(folder, "vocabulary.json").read_text())
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})
    return tokenizer, {split: read_squad_file(Path(folder, f"{split}.json"), folder) for split in SQUAD_QUESTIONS}


def run_data_path(folder: str) -> int:
    """Reads, makes all features, post-processes and scores once; the process's peak memory in bytes."""
    import resource

    import datasets

    from qa.train_questions import place_answers
    from qa.windows import WindowSettings, make_features, make_train_features

    datasets.disable_progress_bars()
    tokenizer, examples = open_squad_shaped(folder)
    make_train_features(place_answers(examples["train"], "train")[0], tokenizer, WindowSettings())
    features = make_features(examples["validation"], tokenizer, WindowSettings())
    our_scores(examples["validation"], our_answers(examples["validation"], features, make_logits(features), folder))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_data_path(folder: str, repeats: int):
    import utils_qa  # noqa: F401, so that the first round does not pay for it
    from qa.windows import WindowSettings, make_features, make_train_features

    tokenizer, examples = open_squad_shaped(folder)
    train, validation = examples.values()
    windows = WindowSettings()
    print(f"{len(train)} and {len(validation)} questions, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'':20}{'ours, s':>10}{'run_qa, s':>11}{'ratio':>8}{'cached, s':>11}{'tokenizer':>11}")
    for what, ours, reference, split in (
        ("train_features", make_train_features, run_qa_train_features, train),
        ("eval_features", make_features, run_qa_features, validation),
    ):
        steps = {
            "ours": functools.partial(ours, split, tokenizer, windows, overwrite_cache=True),
            "reference": functools.partial(reference, split, tokenizer, windows),
            "cached": functools.partial(ours, split, tokenizer, windows),
            "tokenizer": functools.partial(
                tokenize_alone, tokenizer, *(split.unique(c) for c in ("context", "question"))
            ),
        }
        yield data_row(what, alternate_calls(steps, repeats))

    features = make_features(validation, tokenizer, windows)
    run_qa_windows = run_qa_features(validation, tokenizer, windows)
    logits, run_qa_logits = make_logits(features), make_logits(run_qa_windows)
    steps = {
        "ours": functools.partial(our_answers, validation, features, logits, folder),
        "reference": functools.partial(run_qa_answers, validation, run_qa_windows, run_qa_logits, folder),
    }
    yield data_row("postprocess", alternate_calls(steps, repeats))

    predictions = our_answers(validation, features, logits, folder)
    scores, run_qa_scores = our_scores(validation, predictions), squad_evaluate_scores(validation, predictions.answers)
    if any(abs(scores[key] - value) > 1e-9 for key, value in run_qa_scores.items()):
        raise RuntimeError(f"ours {scores} and the reference {run_qa_scores} are not the same metric")
    steps = {
        "ours": functools.partial(our_scores, validation, predictions),
        "reference": functools.partial(squad_evaluate_scores, validation, predictions.answers),
    }
    yield data_row("metric", alternate_calls(steps, repeats))


def tokenize_alone(tokenizer, contexts: list[str], questions: list[str]) -> None:
    """The limit of our features: the distinct texts through the tokenizer, with the offsets of the contexts' tokens."""
    for texts, encode in (
        (contexts, tokenizer.backend_tokenizer.encode_batch),
        (questions, tokenizer.backend_tokenizer.encode_batch_fast),
    ):
        for first in range(0, len(texts), 1000):
            encode(texts[first : first + 1000], add_special_tokens=False)


def alternate_calls(steps: dict, repeats: int) -> dict[str, float]:
    """The median seconds of each call. One round makes each once, so that whatever else the machine does hits all."""
    times = {key: [] for key in steps}
    for _ in range(repeats):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(each) for key, each in times.items()}


def data_row(what: str, seconds: dict[str, float]) -> dict:
    row = {"what": what} | {f"{key}_s": value for key, value in seconds.items()}
    row["ratio"] = row["reference_s"] / row["ours_s"]
    more = ""
    if "tokenizer_s" in row:
        row["tokenizer_share"] = row["tokenizer_s"] / row["ours_s"]  # of our time, what the tokenizer alone takes
        more = f"{row['cached_s']:11.2f}{row['tokenizer_share']:11.0%}"
    print(f"{what:<20}{row['ours_s']:10.2f}{row['reference_s']:11.2f}{row['ratio']:8.1f}{more}", flush=True)
    return row


def write_squad_shaped_files(folder: Path, share: float) -> list[str]:
    """Writes train.json and validation.json with this share of SQuAD 1.1's questions; returns a WordPiece vocabulary.

    Contexts have a lognormal number of words: 150 tokens in the mean, one in a hundred more than 384, as in SQuAD.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    draw, vocabulary = make_language(rng)
    for split, num_questions in SQUAD_QUESTIONS.items():
        num_questions = max(1, round(num_questions * share))
        num_contexts = max(1, round(num_questions / QUESTIONS_PER_PARAGRAPH[split]))
        contexts = draw(np.clip(rng.lognormal(4.63, 0.42, num_contexts), 20, 650).astype(int))
        questions = draw(rng.integers(4, 15, num_questions))
        more = rng.integers(0, num_contexts, num_questions - num_contexts)
        of_context = np.sort(np.concatenate([np.arange(num_contexts), more]))
        paragraphs = [{"context": " ".join(context), "qas": []} for context in contexts]
        for number, (context, question) in enumerate(zip(of_context.tolist(), questions, strict=True)):
            answers = []
            for _ in range(GOLD_ANSWERS[split]):
                first = int(rng.integers(len(contexts[context])))
                text = " ".join(contexts[context][first : first + int(rng.geometric(0.35))])
                start = len(" ".join([*contexts[context][:first], ""]))
                answers.append({"text": text, "answer_start": start})
            question = {"id": f"{split}-{number}", "question": " ".join(question) + "?", "answers": answers}
            paragraphs[context]["qas"].append(question)
        data = {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(data))
    return vocabulary


def make_language(rng):
    """(draw, vocabulary): `draw(lengths)` gives a list of so many words each; and a WordPiece vocabulary for them.

    Words are syllables with Zipf's frequencies; the frequent ones are one token, the rare ones several.
    """
    import numpy as np

    onsets, vowels, codas = "b br c d f g gr h k l m n p pr r s st t tr v w".split(), "aeiou", ["", "n", "r", "s"]
    syllables = np.array([onset + vowel + coda for onset in onsets for vowel in vowels for coda in codas])
    sizes = np.minimum(1 + rng.poisson(np.linspace(0.6, 2.4, 90_000)), 5)
    words = np.split(rng.choice(syllables, sizes.sum()), np.cumsum(sizes)[:-1])
    words = np.array(list(dict.fromkeys("".join(word) for word in words)))
    cumulative = np.cumsum(1 / np.arange(10, len(words) + 10))

    def draw(lengths: np.ndarray) -> list[list[str]]:
        count = lengths.sum()
        drawn = words[np.searchsorted(cumulative, rng.random(count) * cumulative[-1])].astype(object)
        for kind, change in ((rng.random(count) < 0.12, str.capitalize), (rng.random(count) < 0.06, "{},".format)):
            drawn[kind] = [change(word) for word in drawn[kind]]
        numbers = rng.random(count) < 0.03
        drawn[numbers] = rng.integers(1, 2020, numbers.sum()).astype(str)
        drawn[rng.random(count) < 0.045] += "."
        ends = np.cumsum(lengths).tolist()
        return [drawn[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]

    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [f"##{piece}" for piece in [*characters, *syllables.tolist()]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *characters, *pieces, *words[:28_000].tolist(), *syllables.tolist()]))
    return draw, vocabulary


def make_logits(features):
    """(start, end), each float32 (num_windows, 384): noise, and a place in the window that the model likes."""
    import numpy as np

    rng = np.random.default_rng(0)
    positions = np.arange(384)
    place = rng.integers(20, 120, (len(features), 1))
    logits = []
    for shift in (0, 2):
        logit = rng.standard_normal((len(features), 384), dtype=np.float32)
        logits.append((logit + 8 * np.exp(-np.abs(positions - place - shift) / 4)).astype(np.float32))
    return tuple(logits)


def our_answers(examples, features, logits, folder: str):
    from utils_qa import postprocess_qa_predictions, write_predictions

    predictions = postprocess_qa_predictions(examples, features, logits)
    write_predictions(predictions, folder, "ours")
    return predictions


def our_scores(examples, predictions) -> dict[str, float]:
    from utils_qa import squad_scores

    return squad_scores(examples, predictions)


def run_qa_tokenize(batch, tokenizer, windows):
    return tokenizer(
        [question.lstrip() for question in batch["question"]],
        batch["context"],
        truncation="only_second",
        max_length=windows.max_seq_length,
        stride=windows.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def run_qa_train_features(examples, tokenizer, windows):
    """Training features in the way of run_qa.py: every pair tokenized, then loops over its tokens."""

    def prepare(batch):
        encoded = run_qa_tokenize(batch, tokenizer, windows)
        sample = encoded.pop("overflow_to_sample_mapping")
        starts, ends = [], []
        for i, offsets in enumerate(encoded.pop("offset_mapping")):
            no_answer = encoded["input_ids"][i].index(tokenizer.cls_token_id)
            sequence = encoded.sequence_ids(i)
            answers = batch["answers"][sample[i]]
            if len(answers["answer_start"]) == 0:
                starts.append(no_answer)
                ends.append(no_answer)
                continue
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            first, last = 0, len(sequence) - 1
            while sequence[first] != 1:
                first += 1
            while sequence[last] != 1:
                last -= 1
            if offsets[first][0] > start_char or offsets[last][1] < end_char:
                starts.append(no_answer)
                ends.append(no_answer)
                continue
            while first < len(offsets) and offsets[first][0] <= start_char:
                first += 1
            while offsets[last][1] >= end_char:
                last -= 1
            starts.append(first - 1)
            ends.append(last + 1)
        encoded["start_positions"], encoded["end_positions"] = starts, ends
        return encoded

    return examples.map(prepare, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)


def run_qa_features(examples, tokenizer, windows):
    """Evaluation features in the way of run_qa.py: the id and the offsets of the context's tokens are kept."""

    def prepare(batch):
        encoded = run_qa_tokenize(batch, tokenizer, windows)
        sample = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = [batch["id"][i] for i in sample]
        for i, offsets in enumerate(encoded["offset_mapping"]):
            sequence = encoded.sequence_ids(i)
            encoded["offset_mapping"][i] = [span if sequence[k] == 1 else None for k, span in enumerate(offsets)]
        return encoded

    return examples.map(prepare, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)


def run_qa_answers(examples, features, logits, folder: str, n_best_size: int = 20, max_answer_length: int = 30) -> None:
    """Answers in the way of run_qa.py: every pair of a likely start and a likely end in a Python loop."""
    import numpy as np

    windows_of = defaultdict(list)
    for i, id_ in enumerate(features["example_id"]):
        windows_of[id_].append(i)
    answers, n_best_answers = {}, {}
    for example in examples:
        spans = []
        for i in windows_of[example["id"]]:
            start_logits, end_logits = logits[0][i], logits[1][i]
            offsets = features[i]["offset_mapping"]
            starts = np.argsort(start_logits)[-1 : -n_best_size - 1 : -1].tolist()
            ends = np.argsort(end_logits)[-1 : -n_best_size - 1 : -1].tolist()
            for start in starts:
                for end in ends:
                    if start >= len(offsets) or end >= len(offsets) or not offsets[start] or not offsets[end]:
                        continue
                    if end < start or end - start + 1 > max_answer_length:
                        continue
                    span = {
                        "offsets": (offsets[start][0], offsets[end][1]),
                        "score": start_logits[start] + end_logits[end],
                        "start_logit": start_logits[start],
                        "end_logit": end_logits[end],
                    }
                    spans.append(span)
        best = sorted(spans, key=lambda span: span["score"], reverse=True)[:n_best_size]
        for span in best:
            start, end = span.pop("offsets")
            span["text"] = example["context"][start:end]
        if not best:
            best = [{"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0}]
        scores = np.array([span.pop("score") for span in best])
        exponentials = np.exp(scores - scores.max())
        for probability, span in zip(exponentials / exponentials.sum(), best, strict=True):
            span["probability"] = probability
        answers[example["id"]] = best[0]["text"]
        n_best_answers[example["id"]] = [
            {key: value if isinstance(value, str) else float(value) for key, value in span.items()} for span in best
        ]
    for name, value in (("predictions", answers), ("nbest_predictions", n_best_answers)):
        Path(folder, f"reference_{name}.json").write_text(json.dumps(value, indent=4) + "\n")


def squad_evaluate_scores(examples, answers: dict[str, str]) -> dict[str, float]:
    """The official metric of version 1 in plain Python, question by question."""

    def normalize(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold: str, answer: str) -> float:
        gold_words, answer_words = normalize(gold).split(), normalize(answer).split()
        common = sum((Counter(gold_words) & Counter(answer_words)).values())
        if not gold_words or not answer_words:
            return float(gold_words == answer_words)
        if common == 0:
            return 0.0
        precision, recall = common / len(answer_words), common / len(gold_words)
        return 2 * precision * recall / (precision + recall)

    exact_scores, f1_scores = [], []
    for example in examples:
        golds = [text for text in example["answers"]["text"] if normalize(text)] or [""]
        answer = answers[example["id"]]
        exact_scores.append(max(int(normalize(gold) == normalize(answer)) for gold in golds))
        f1_scores.append(max(f1(gold, answer) for gold in golds))
    total = len(examples)
    return {"exact": 100 * sum(exact_scores) / total, "f1": 100 * sum(f1_scores) / total, "total": total}


# Training steps: what padding costs


def add_training_command(commands) -> None:
    parser = commands.add_parser(
        "training", help="training steps on text of SQuAD's shape: padded to 384, padded to the batch, and ours"
    )
    parser.add_argument("--size", choices=MODEL_SHAPES, default="base", help="shape of the BERT (%(default)s)")
    parser.add_argument("--questions", type=int, default=20_000, help="to train on (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=12, help="windows in a batch (%(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="batches in a round (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.set_defaults(run=measure_training)


# size -> (hidden size, layers, heads)
MODEL_SHAPES = {"mini": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}


def measure_training(args: argparse.Namespace) -> list[dict]:
    """A row for each way of making batches: windows a second (median of the rounds) and the share of padding."""
    import datasets
    import numpy as np
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    from qa.windows import QADataCollator, WindowSettings, make_features, make_train_features

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = write_squad_shaped_files(Path(folder), args.questions / SQUAD_QUESTIONS["train"])
        Path(folder, "vocabulary.json").write_text(json.dumps(vocabulary))
        tokenizer, examples = open_squad_shaped(folder)
        features = make_train_features(examples["train"], tokenizer, WindowSettings())
        eval_features = make_features(examples["validation"], tokenizer, WindowSettings())
        lengths, eval_lengths = np.asarray(features["length"]), np.asarray(eval_features["length"])

        shuffled = np.random.default_rng(0).permutation(len(lengths))
        batches = {
            "padded to 384": in_batches(shuffled, args.batch_size),
            "padded to the batch": in_batches(shuffled, args.batch_size),
            "ours": in_batches(training_order(features, args.batch_size), args.batch_size),
        }
        collators = {name: QADataCollator(tokenizer) for name in batches}
        collators["padded to 384"] = QADataCollator(tokenizer, pad_to_max_length=384)

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        hidden, layers, heads = MODEL_SHAPES[args.size]
        torch.manual_seed(0)
        model = BertForQuestionAnswering(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
            )
        ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)

        def run_round(way: str) -> None:
            # Evenly over the batches by their length, so that few stand for all.
            by_length = sorted(batches[way], key=lambda batch: lengths[batch].max())
            for place in (np.arange(args.batches) + 0.5) * len(by_length) / args.batches:
                rows = [features[int(index)] for index in by_length[int(place)]]
                inputs = {key: tensor.to(device) for key, tensor in collators[way](rows).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        for way in batches:
            run_round(way)
        seconds = alternate_calls({way: functools.partial(run_round, way) for way in batches}, args.repeats)

    print(f"{name}, BERT-{args.size}, batches of {args.batch_size}, {len(lengths)} windows")
    print(f"{'':22}{'windows/s':>10}{'ratio':>8}{'padding':>9}")
    rows = []
    for way, spent in seconds.items():
        longest = 384 if way == "padded to 384" else None
        row = {"what": way, "size": args.size, "device": name, "seconds": spent}
        row["windows_per_second"] = args.batches * args.batch_size / spent
        row["ratio"] = seconds["padded to 384"] / spent
        row["padding"] = padding_share(lengths, batches[way], longest)
        rows.append(row)
        print(f"{way:<22}{row['windows_per_second']:10.2f}{row['ratio']:8.2f}{row['padding']:9.1%}")
    by_length = in_batches(np.argsort(-eval_lengths, kind="stable"), args.batch_size)
    rows.append({"what": "ours, evaluation", "padding": padding_share(eval_lengths, by_length, None)})
    print(f"{'ours, evaluation':<22}{'':18}{rows[-1]['padding']:9.1%}")
    return rows


def training_order(features, batch_size: int) -> list[int]:
    """The order of an epoch's windows as run_squad.py trains on them."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(0)
    return list(LengthGroupedSampler(batch_size, lengths=features["length"], generator=generator))


def in_batches(order, batch_size: int) -> list:
    import numpy as np

    return [np.asarray(order[first : first + batch_size]) for first in range(0, len(order), batch_size)]


def padding_share(lengths, batches: list, longest: int | None) -> float:
    """The share of tokens that are padding where each batch is as wide as its longest window, or `longest`."""
    tokens = sum(len(batch) * (longest or int(lengths[batch].max())) for batch in batches)
    return 1 - int(lengths.sum()) / tokens


# Long documents and large sets


CONTRACT_CHARACTERS, CONTRACT_QUESTIONS = 54_000, 41  # as in CUAD
SCALE_BATCH = 32


def add_scale_command(commands) -> None:
    parser = commands.add_parser(
        "scale",
        help="contracts of 54,000 characters with 41 questions, in windows of 128 tokens: how time and memory grow",
    )
    parser.add_argument("--contracts", type=int, nargs="+", default=[1, 4, 16], help="in each set (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.set_defaults(run=measure_scale)


def measure_scale(args: argparse.Namespace) -> list[dict]:
    """A row for each stage and size, and in the way of run_qa.py for the smallest: seconds and peak memory in bytes.

    Reading, features, and evaluation with post-processing have a process of their own each.
    """
    print(f"one core, Python {platform.python_version()}")
    print(
        f"{'':17}{'contracts':>10}{'windows':>9}{'seconds':>9}{'of CPU':>8}{'a CPU second':>14}{'peak MB':>9}"
        f"{'mapped MB':>11}"
    )
    rows = []
    for contracts in sorted(args.contracts):
        with tempfile.TemporaryDirectory() as folder:
            write_contracts(Path(folder), contracts)
            stages = [read_contracts, make_contract_windows, answer_contracts]
            if contracts == min(args.contracts):
                stages.append(answer_contracts_as_run_qa)
            for stage in stages:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, context) as executor:
                    measured = executor.submit(stage, folder).result()
                for row in measured:
                    rows.append({"contracts": contracts} | row)
                    print_scale_row(rows[-1])
    return rows


def print_scale_row(row: dict) -> None:
    windows, seconds = row["windows"] or "", row["seconds"]
    rate = f"{row['windows'] / row['cpu_seconds']:14.0f}" if row["windows"] else f"{'':14}"
    print(
        f"{row['what']:<17}{row['contracts']:10}{windows:>9}{seconds:9.2f}{row['cpu_seconds']:8.2f}{rate}"
        f"{row['peak_bytes'] / 1e6:9.0f}{row['mapped_bytes'] / 1e6:11.0f}",
        flush=True,
    )


def write_contracts(folder: Path, contracts: int) -> None:
    """Writes contracts.json, in SQuAD's layout, and vocabulary.json."""
    import numpy as np

    rng = np.random.default_rng(0)
    draw, vocabulary = make_language(rng)
    texts = draw(np.full(contracts, CONTRACT_CHARACTERS // 5))
    questions = [" ".join(words) + "?" for words in draw(rng.integers(8, 20, CONTRACT_QUESTIONS))]
    articles = []
    for number, words in enumerate(texts):
        context = " ".join(words)[:CONTRACT_CHARACTERS]
        qas = []
        for place, question in enumerate(questions):
            start = int(rng.integers(len(context) - 100))
            answer = {"text": context[start : start + 30], "answer_start": start}
            qas.append({"id": f"{number}-{place}", "question": question, "answers": [answer]})
        articles.append({"title": f"contract {number}", "paragraphs": [{"context": context, "qas": qas}]})
    (folder / "contracts.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))


class Measured:
    """Seconds, those of the processor alone, and peak memory of a `with` block.

    Memory is of two kinds: what is no file's, and the mapped pages of files, which the kernel takes back when it needs
    room. Read from Linux's /proc.
    """

    def __enter__(self):
        self.anonymous = self.mapped = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *failure):
        self.seconds = time.perf_counter() - self._start[0]
        self.cpu_seconds = time.process_time() - self._start[1]
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        last = False
        while not last:
            last = self._done.wait(0.02)
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, 1024 * int(status["RssAnon"].split()[0]))
            self.mapped = max(self.mapped, 1024 * int(status["RssFile"].split()[0]))

    def row(self, what: str, windows: int = 0) -> dict:
        row = {"what": what, "windows": windows, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return row | {"peak_bytes": self.anonymous, "mapped_bytes": self.mapped}


def contract_stage(folder: str):
    """(tokenizer, window settings, function that reads the questions)."""
    import datasets
    import torch
    from transformers import BertTokenizer

    from qa.read_squad import read_squad_file
    from qa.windows import WindowSettings

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    vocabulary = json.loads(Path(folder, "vocabulary.json").read_text())
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})
    tokenizer("a", "a")  # what it makes at its first call
    return tokenizer, WindowSettings(128, 64), lambda: read_squad_file(Path(folder, "contracts.json"), folder)


def read_contracts(folder: str) -> list[dict]:
    *_, read = contract_stage(folder)
    with Measured() as measured:
        read()
    return [measured.row("reading")]


def make_contract_windows(folder: str) -> list[dict]:
    from qa.windows import make_features

    tokenizer, windows, read = contract_stage(folder)
    examples = read()
    with Measured() as measured:
        features = make_features(examples, tokenizer, windows)
    return [measured.row("features", len(features))]


def answer_contracts(folder: str) -> list[dict]:
    from qa.windows import QADataCollator, make_features
    from run_squad import QATrainingArguments
    from trainer_qa import QuestionAnsweringTrainer
    from utils_qa import write_predictions

    tokenizer, windows, read = contract_stage(folder)
    examples = read()
    features = make_features(examples, tokenizer, windows)
    trainer = QuestionAnsweringTrainer(
        model=make_tiny_bert(len(tokenizer)),
        args=QATrainingArguments(folder, per_device_eval_batch_size=SCALE_BATCH, disable_tqdm=True),
        data_collator=QADataCollator(tokenizer),
        processing_class=tokenizer,
    )
    with Measured() as evaluation:
        search, _ = trainer.find_answers(features, examples, "eval")
    with Measured() as post_processing:
        write_predictions(search.predictions(), folder, "eval")
    return [evaluation.row("evaluation", len(features)), post_processing.row("post-processing", len(features))]


def answer_contracts_as_run_qa(folder: str) -> list[dict]:
    """All in the way of run_qa.py: windows, the Trainer's own evaluation, which keeps all logits, and answers."""
    import numpy as np
    import torch
    import transformers
    from transformers import Trainer, TrainingArguments, default_data_collator

    transformers.logging.set_verbosity_error()
    tokenizer, windows, read = contract_stage(folder)
    examples = read()
    windows = dataclasses.replace(windows, doc_stride=40)  # there the overlap, which makes about as many windows
    with Measured() as making:
        features = run_qa_features(examples, tokenizer, windows)
    arguments = {"per_device_eval_batch_size": SCALE_BATCH, "disable_tqdm": True, "report_to": "none"}
    arguments |= {"use_cpu": not torch.accelerator.is_available()}
    trainer = Trainer(
        model=make_tiny_bert(len(tokenizer)),
        args=TrainingArguments(folder, **arguments),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    with Measured() as evaluation:
        logits = trainer.predict(features.remove_columns(["example_id", "offset_mapping"])).predictions
    with Measured() as post_processing:
        run_qa_answers(examples, features, [np.asarray(part) for part in logits], folder)
    stages = {"features": making, "evaluation": evaluation, "answers": post_processing}
    return [measured.row(f"run_qa {what}", len(features)) for what, measured in stages.items()]


def make_tiny_bert(vocab_size: int):
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    return BertForQuestionAnswering(
        BertConfig(
            vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
        )
    )


if __name__ == "__main__":
    main()
