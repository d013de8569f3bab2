"""What this project costs, beside what it replaces: tables, and their rows as JSON.

python scripts/benchmark.py {attention,data,training,scale} [--json FILE] [further flags: --help]
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import string
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import peer_run_qa  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.bert.modeling_bert import BertLayer  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402

from qa.files import write_json  # noqa: E402
from qa.modeling_relative_bert import RelativeBertLayer, RelativeBertSelfAttention  # noqa: E402
from qa.read_squad import read_squad_file  # noqa: E402
from qa.windows import QADataCollator, WindowSettings, make_features  # noqa: E402
from run_squad import QATrainingArguments  # noqa: E402
from trainer_qa import QuestionAnsweringTrainer  # noqa: E402
from utils_qa import AnswerSettings, postprocess_qa_predictions, squad_scores, write_predictions  # noqa: E402

# size -> (hidden size, heads, intermediate size), and lengths x batch sizes; toy is what the quickstart trains
ATTENTION_SHAPES = {
    "toy": ((128, 8, 256), ["28x32"]),
    "base": ((768, 12, 3072), ["48x32", "160x10", "384x4", "512x4"]),
    "large": ((1024, 16, 4096), ["160x10", "384x4", "512x4"]),
}
MODEL_SHAPES = {"mini": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}  # hidden size, layers, heads
SQUAD = {"train": (87_599, 4.6, 1), "validation": (10_570, 5.1, 3)}  # questions, questions a paragraph, gold answers
CONTRACT_WORDS, CONTRACT_QUESTIONS = 7_100, 41  # as in CUAD: 54,000 characters
SCALE_BATCH = 32
RELATIVE_TYPES = ("relative_key", "relative_key_query")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, run: Callable, explanation: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=explanation, description=explanation)
        command.add_argument("--json", type=Path, help="file to write the rows to")
        if name != "scale":
            command.add_argument("--repeats", type=int, default=8 if name == "attention" else 3, help="timed rounds")
        command.set_defaults(run=run)
        return command

    explanation = "one BERT layer with relative positions: ours, the plain formula, absolute positions under sdpa"
    attention = add_command("attention", measure_attention, explanation)
    attention.add_argument("--sizes", nargs="+", choices=ATTENTION_SHAPES, default=list(ATTENTION_SHAPES))
    attention.add_argument("--lengths", nargs="+", help="length x batch size (those that the size is used with)")
    attention.add_argument("--passes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    attention.add_argument("--dropout", type=float, default=0.0, help="of the probabilities, in training")
    explanation = "features, post-processing and metric on text of SQuAD's shape: ours and in the way of run_qa.py"
    data = add_command("data", measure_data, explanation)
    data.add_argument("--questions", type=int, default=87_599, help="in training; evaluation shrinks alike")
    explanation = "training steps on text of SQuAD's shape: padded to 384, padded to the batch, and ours"
    training = add_command("training", measure_training, explanation)
    training.add_argument("--size", choices=MODEL_SHAPES, default="base", help="shape of the BERT")
    training.add_argument("--questions", type=int, default=20_000, help="to train on")
    training.add_argument("--batch_size", type=int, default=12, help="windows in a batch")
    training.add_argument("--batches", type=int, default=8, help="batches in a round")
    explanation = "contracts of 54,000 characters with 41 questions, in windows of 128 tokens: how time and memory grow"
    scale = add_command("scale", measure_scale, explanation)
    scale.add_argument("--contracts", type=int, nargs="+", default=[1, 4, 16], help="in each set")

    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    rows = []
    for row in args.run(args):
        print_row(row, heads=not rows or rows[-1].keys() != row.keys())
        rows.append(row)
    if args.json:
        write_json(args.json, rows)


def print_row(row: dict, heads: bool) -> None:
    if heads:
        print(f"{'':40}" + "".join(f"{key:>14}" for key in list(row)[1:]))
    what, *values = row.values()
    digits = [0 if isinstance(value, int) or value > 100 else 3 for value in values]
    figures = [f"{value:>14.{number}f}" for value, number in zip(values, digits, strict=True)]
    print(f"{what:<40}" + "".join(figures), flush=True)


# ---- Relative against absolute positions, one BERT layer ----


def measure_attention(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each size, length, pass and position type: medians and peak memory."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    shapes = [(size, shape) for size in args.sizes for shape in args.lengths or ATTENTION_SHAPES[size][1]]
    for (size, shape), kind, position_type in itertools.product(shapes, args.passes, RELATIVE_TYPES):
        length, batch = map(int, shape.split("x"))
        layers = make_layers(size, length, position_type, args.dropout)
        hidden = torch.randn(batch, length, ATTENTION_SHAPES[size][0][0]).to(DEVICE, dtype)
        hidden.requires_grad_(kind == "train")
        steps = {who: make_step(layer.to(DEVICE, dtype), hidden, kind) for who, layer in layers.items()}
        seconds = alternate(steps, args.repeats)
        memory = {who: peak_of_tensors(step) / 1e6 for who, step in steps.items()}
        yield {
            "what": f"{position_type} {kind} {shape} {size}",
            **{f"{who}_s": value for who, value in seconds.items()},
            "ours/abs": seconds["ours"] / seconds["absolute"],
            "ref/abs": seconds["reference"] / seconds["absolute"],
            "ours/ref": seconds["ours"] / seconds["reference"],
            **{f"{who}_mb": value for who, value in memory.items()},
            # What relative positions add, as a share of what the reference adds.
            "added": (memory["ours"] - memory["absolute"]) / max(1e-6, memory["reference"] - memory["absolute"]),
        }


def make_layers(size: str, length: int, position_type: str, dropout: float) -> dict[str, torch.nn.Module]:
    """Ours, the reference, and for absolute positions that of transformers, with equal weights."""
    hidden, heads, intermediate = ATTENTION_SHAPES[size][0]
    config = BertConfig(
        **{"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate},
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max(512, length),
        position_embedding_type=position_type,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    layers = {"ours": RelativeBertLayer(config), "absolute": BertLayer(config), "reference": RelativeBertLayer(config)}
    layers["reference"].attention.self = ReferenceSelfAttention(config)
    for layer in layers.values():
        layer.load_state_dict(layers["ours"].state_dict(), strict=False)
    return layers


class ReferenceSelfAttention(RelativeBertSelfAttention):
    """The formula as it reads, over a gathered (length, length, head size) tensor of distance embeddings."""

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


def make_step(layer, hidden, kind: str) -> Callable[[], None]:
    """A call of no arguments: one forward pass without gradients, or forward and backward with dropout."""

    def forward():
        output = layer(hidden)  # (batch, length, hidden), or a tuple that begins with it
        return output[0] if isinstance(output, tuple) else output

    def train():
        forward().sum().backward()
        layer.zero_grad()
        hidden.grad = None

    layer.train(kind == "train")
    return train if kind == "train" else torch.no_grad()(forward)


# ---- Text to windows, logits to answers, answers to scores ----


def measure_data(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each part of the data path, with medians and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        write_squad_shaped(folder, args.questions / SQUAD["train"][0])
        tokenizer, windows = open_tokenizer(folder), WindowSettings()
        train, validation = read(folder, "train"), read(folder, "validation")
        for what, examples, reference in (
            ("train_features", train, peer_run_qa.make_train_features),
            ("eval_features", validation, peer_run_qa.make_features),
        ):
            steps = {
                "ours": functools.partial(make_features, examples, tokenizer, windows, overwrite_cache=True),
                "run_qa": functools.partial(reference, examples, tokenizer, windows),
                "cached": functools.partial(make_features, examples, tokenizer, windows),
            }
            yield data_row(f"{what} of {len(examples)} questions", alternate(steps, args.repeats))

        features = make_features(validation, tokenizer, windows)
        peer_features = peer_run_qa.make_features(validation, tokenizer, windows)
        logits, peer_logits = make_logits(features), make_logits(peer_features)
        steps = {
            "ours": functools.partial(our_answers, validation, features, logits, folder),
            "run_qa": functools.partial(peer_run_qa.write_answers, validation, peer_features, peer_logits, folder),
        }
        yield data_row("postprocess", alternate(steps, args.repeats))

        predictions = our_answers(validation, features, logits, folder)
        steps = {
            "ours": functools.partial(squad_scores, validation, predictions),
            "run_qa": functools.partial(peer_run_qa.score, validation, predictions.answers),
        }
        scores, peer_scores = (step() for step in steps.values())
        if any(abs(scores[key] - value) > 1e-9 for key, value in peer_scores.items()):
            raise RuntimeError(f"ours {scores} and the reference {peer_scores} are not the same metric")
        yield data_row("metric", alternate(steps, args.repeats))


def data_row(what: str, seconds: dict[str, float]) -> dict:
    return {"what": what, "ratio": seconds["run_qa"] / seconds["ours"]} | {f"{k}_s": v for k, v in seconds.items()}


def make_logits(features) -> tuple[np.ndarray, np.ndarray]:
    """(start, end), each float32 (num_windows, 384): noise, and a place in the window that the model likes."""
    rng = np.random.default_rng(0)
    place = rng.integers(20, 120, (len(features), 1))
    distance = np.abs(np.arange(384) - place)
    start, end = rng.standard_normal((2, len(features), 384), dtype=np.float32)
    likes = 8 * np.exp(-distance / 4).astype(np.float32)
    return start + likes, end + np.roll(likes, 2, axis=1)


def our_answers(examples, features, logits, folder: str):
    predictions = postprocess_qa_predictions(examples, features, logits, AnswerSettings())
    write_predictions(predictions, folder, "ours")
    return predictions


# ---- Training steps: what padding costs ----


def measure_training(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each way of making batches: windows a second (median of the rounds) and the share of padding."""
    with tempfile.TemporaryDirectory() as folder:
        write_squad_shaped(folder, args.questions / SQUAD["train"][0])
        tokenizer = open_tokenizer(folder)
        features = make_features(read(folder, "train"), tokenizer, WindowSettings())
        lengths = np.asarray(features["length"])

        def in_batches(order) -> list[np.ndarray]:
            return np.split(np.asarray(order), range(args.batch_size, len(order), args.batch_size))

        shuffled = np.random.default_rng(0).permutation(len(lengths))
        generator = torch.Generator().manual_seed(0)
        grouped = list(LengthGroupedSampler(args.batch_size, lengths=lengths.tolist(), generator=generator))
        to_batch = QADataCollator(tokenizer)
        ways = {
            "padded to 384": (QADataCollator(tokenizer, pad_to_max_length=384), in_batches(shuffled)),
            "padded to the batch": (to_batch, in_batches(shuffled)),
            "ours": (to_batch, in_batches(grouped)),  # as run_squad.py trains
        }

        hidden, layers, heads = MODEL_SHAPES[args.size]
        torch.manual_seed(0)
        shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        config = BertConfig(vocab_size=len(tokenizer), intermediate_size=4 * hidden, **shape)
        model = BertForQuestionAnswering(config).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)

        def run_round(collate, batches: list[np.ndarray]) -> None:
            # Evenly over the batches by their length, so that few stand for all.
            by_length = sorted(batches, key=lambda batch: lengths[batch].max())
            for place in (np.arange(args.batches) + 0.5) * len(by_length) / args.batches:
                rows = [features[int(index)] for index in by_length[int(place)]]
                inputs = {key: tensor.to(DEVICE) for key, tensor in collate(rows).items()}
                with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                    loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        steps = {way: functools.partial(run_round, *parts) for way, parts in ways.items()}
        seconds = alternate(steps, args.repeats)

    for way, (_, batches) in ways.items():
        widths = [384 if way == "padded to 384" else int(lengths[batch].max()) for batch in batches]
        tokens = sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
        yield {
            "what": f"{way}, BERT-{args.size}",
            "windows/s": args.batches * args.batch_size / seconds[way],
            "ratio": seconds["padded to 384"] / seconds[way],
            "padding": 1 - int(lengths.sum()) / tokens,
        }


# ---- Long documents and large sets ----


def measure_scale(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each stage and size, and in the way of run_qa.py for the smallest: seconds, those of one core alone,
    and peak memory.
    """
    for contracts in sorted(args.contracts):
        ways = [answer_contracts, answer_contracts_as_run_qa][: 2 if contracts == min(args.contracts) else 1]
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            draw = write_language(folder, rng)
            lengths = np.full(contracts, CONTRACT_WORDS)
            write_questions(folder, "contracts", rng, draw, lengths, contracts * CONTRACT_QUESTIONS, num_golds=1)
            # Each in a process of its own, whose memory nothing else has grown.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as executor:
                results = [executor.submit(way, folder).result() for way in ways]
        for windows, stages in results:
            for what, measured in stages.items():
                rate = windows / measured["cpu_s"]
                yield {"what": f"{what}, {contracts} contracts", "windows": windows, **measured, "windows/cpu_s": rate}


def answer_contracts(folder: str) -> tuple[int, dict[str, dict]]:
    """(number of windows, what each stage takes)."""
    tokenizer, windows, model = open_on_one_core(folder)
    examples, reading = measure(lambda: read(folder, "contracts"))
    features, making = measure(lambda: make_features(examples, tokenizer, windows))
    trainer = QuestionAnsweringTrainer(
        model=model,
        args=QATrainingArguments(folder, per_device_eval_batch_size=SCALE_BATCH, disable_tqdm=True),
        data_collator=QADataCollator(tokenizer),
        processing_class=tokenizer,
    )
    (search, _), evaluation = measure(lambda: trainer.find_answers(features, examples, "eval"))
    _, post_processing = measure(lambda: write_predictions(search.predictions(), folder, "eval"))
    stages = {"reading": reading, "features": making, "evaluation": evaluation, "post-processing": post_processing}
    return len(features), stages


def answer_contracts_as_run_qa(folder: str) -> tuple[int, dict[str, dict]]:
    """All in the way of run_qa.py: windows, the Trainer's own evaluation, which keeps all logits, and answers."""
    tokenizer, windows, model = open_on_one_core(folder)
    examples = read(folder, "contracts")
    windows = dataclasses.replace(windows, doc_stride=40)  # there the overlap, which makes about as many windows
    features, making = measure(lambda: peer_run_qa.make_features(examples, tokenizer, windows))
    arguments = {"per_device_eval_batch_size": SCALE_BATCH, "disable_tqdm": True, "report_to": "none"}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(folder, use_cpu=DEVICE == "cpu", **arguments),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    inputs = features.remove_columns(["example_id", "offset_mapping"])
    output, evaluation = measure(lambda: trainer.predict(inputs))
    _, answering = measure(lambda: peer_run_qa.write_answers(examples, features, output.predictions, folder))
    return len(features), {"run_qa features": making, "run_qa evaluation": evaluation, "run_qa answers": answering}


def open_on_one_core(folder: str) -> tuple:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = open_tokenizer(folder)
    tokenizer("a", "a")  # what it makes at its first call
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), **shape))
    return tokenizer, WindowSettings(128, 64), model


# ---- Text of SQuAD's shape ----


def write_squad_shaped(folder: str, share: float) -> None:
    """Writes train.json and validation.json with this share of SQuAD 1.1's questions, and vocabulary.json.

    Contexts have a lognormal number of words: 150 tokens in the mean, one in a hundred more than 384, as in SQuAD.
    """
    rng = np.random.default_rng(0)
    draw = write_language(folder, rng)
    for split, (questions_of_split, per_paragraph, num_golds) in SQUAD.items():
        num_questions = max(1, round(questions_of_split * share))
        num_contexts = max(1, round(num_questions / per_paragraph))
        lengths = np.clip(rng.lognormal(4.63, 0.42, num_contexts), 20, 650).astype(int)
        write_questions(folder, split, rng, draw, lengths, num_questions, num_golds)


def write_questions(folder: str, name: str, rng, draw, lengths: np.ndarray, num_questions: int, num_golds: int) -> None:
    """Writes `name`.json in SQuAD's layout: contexts of so many words each, and at least one question on each."""
    contexts, questions = draw(lengths), draw(rng.integers(4, 15, num_questions))
    more = rng.integers(0, len(contexts), num_questions - len(contexts))
    of_context = np.sort(np.concatenate([np.arange(len(contexts)), more]))
    paragraphs = [{"context": " ".join(context), "qas": []} for context in contexts]
    for number, (context, question) in enumerate(zip(of_context.tolist(), questions, strict=True)):
        words, answers = contexts[context], []
        for _ in range(num_golds):
            first = int(rng.integers(len(words)))
            text = " ".join(words[first : first + int(rng.geometric(0.35))])
            answers.append({"text": text, "answer_start": len(" ".join([*words[:first], ""]))})
        question = {"id": f"{name}-{number}", "question": " ".join(question) + "?", "answers": answers}
        paragraphs[context]["qas"].append(question)
    data = {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}
    Path(folder, f"{name}.json").write_text(json.dumps(data))


def write_language(folder: str, rng) -> Callable[[np.ndarray], list[list[str]]]:
    """Writes vocabulary.json, of WordPiece; returns a function from lengths to lists of so many words.

    Words are syllables with Zipf's frequencies; the frequent ones are one token, the rare ones several.
    """
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
    vocabulary = dict.fromkeys([*special, *characters, *pieces, *words[:28_000].tolist(), *syllables.tolist()])
    write_json(Path(folder, "vocabulary.json"), list(vocabulary))
    return draw


def open_tokenizer(folder: str):
    vocabulary = json.loads(Path(folder, "vocabulary.json").read_text())
    return BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})


def read(folder: str, name: str):
    return read_squad_file(str(Path(folder, f"{name}.json")), folder)


# ---- Time and memory ----


def alternate(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each step, after an untimed round. A round calls each once: what the machine does hits all."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    times = {key: [] for key in steps}
    for _ in range(1 + repeats):
        for key, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(each[1:]) for key, each in times.items()}


def peak_of_tensors(step: Callable) -> int:
    """The most bytes of tensors at one time during `step`, above what there was before."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(0, *np.cumsum([event["args"]["Bytes"] for event in events]).tolist())


def measure(call: Callable) -> tuple[object, dict[str, float]]:
    """(what `call` returns, its seconds, those of the processor alone, and the process's peak memory).

    Memory is of two kinds: what is no file's, and the mapped pages of files, which the kernel takes back when it needs
    room.
    """
    peaks, done = {"peak_mb": 0.0, "mapped_mb": 0.0}, threading.Event()

    def watch() -> None:
        while not done.is_set():
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for key, name in (("peak_mb", "RssAnon"), ("mapped_mb", "RssFile")):
                peaks[key] = max(peaks[key], 1024 * int(status[name].split()[0]) / 1e6)
            done.wait(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    spent = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    done.set()
    watcher.join()
    return result, spent | peaks


if __name__ == "__main__":
    main()
