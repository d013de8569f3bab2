#!/usr/bin/env python
"""Writes a trained model as ONNX, which onnxruntime runs without PyTorch, and checks it against the model.

    python scripts/export_onnx.py MODEL_DIR
    python scripts/export_onnx.py MODEL_DIR --int8 --validation_file dev-v1.1.json

Inputs are those that the model's tokenizer gives, (batch, length) int64 of any batch and any length that the model
takes; outputs are start_logits and end_logits, (batch, length) float32.
"""

import argparse
import importlib.util
import inspect
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402

from qa import load_model  # noqa: E402
from qa.columns import column  # noqa: E402
from qa.distributed import set_up_logging  # noqa: E402
from qa.files import OneLineParser, QAError, told_in_one_line  # noqa: E402
from qa.read_squad import read_squad_file  # noqa: E402
from qa.windows import QADataCollator, WindowSettings, make_features  # noqa: E402
from scripts import ask  # noqa: E402
from utils_qa import AnswerSearch, AnswerSettings, squad_scores  # noqa: E402

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("start_logits", "end_logits")
LARGEST_DIFFERENCE = 1e-3  # of logits; rounding makes some 1e-5
WINDOWS_PER_BATCH = 16


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="export_onnx.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", metavar="FILE", help="by default model.onnx in MODEL_DIR, or here")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier export")
    parser.add_argument("--int8", action="store_true", help="write a second file, whose weights are 8-bit integers")
    parser.add_argument("--validation_file", metavar="FILE", help="compare f1 and speed on the questions of this file")
    ask.add_model_arguments(parser)
    try:
        export(parser.parse_args(argv))
    except QAError as error:
        parser.refuse(error)


def export(args: argparse.Namespace) -> None:
    set_up_logging(logging.ERROR)  # warnings are those of the exporters about themselves
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise QAError(f"not installed: {', '.join(missing)}; install with: python -m pip install {' '.join(missing)}")
    output = Path(args.output or Path(args.model_dir if os.path.isdir(args.model_dir) else "", "model.onnx"))
    paths = [output, output.with_name(f"{output.stem}_int8.onnx")][: 1 + args.int8]
    for path in paths:
        if path.exists() and not args.overwrite:
            raise QAError(f"{path} exists: replace it with --overwrite, or give another --output")

    model, tokenizer, settings = ask.load(args)
    model.cpu()
    ours = {ours: settings[theirs] for ours, theirs in load_model.PIPELINE_SETTINGS.items()}
    windows, answers = (
        kind(**{f.name: ours[f.name] for f in fields(kind)}) for kind in (WindowSettings, AnswerSettings)
    )
    if args.validation_file:
        examples = read_squad_file(args.validation_file)
        without_labels = examples.select_columns(["id", "context", "question"])
        features = make_features(without_labels, tokenizer, windows)

    runs = {args.model_dir: run_of_model(model)}
    lengths = (1, settings["max_seq_len"] // 2 + 1, settings["max_seq_len"])
    samples = [sample(tokenizer, batch, length) for batch, length in enumerate(lengths, start=1)]
    with told_in_one_line(f"cannot export {args.model_dir} to {output}"):
        expected = [runs[args.model_dir](batch) for batch in samples]
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            files = [Path(folder, path.name) for path in paths]
            write_onnx(model, sample(tokenizer, 2, 16), files[0])
            if args.int8:
                from onnxruntime.quantization import quantize_dynamic

                # In truth 7 bits: with 8, sums of two products overflow on processors without VNNI.
                quantize_dynamic(*files, per_channel=True, reduce_range=True)
            for path, file in zip(paths, files, strict=True):
                runs[path] = run_of_file(file)
                difference = max((runs[path](b) - e).abs().max().item() for b, e in zip(samples, expected, strict=True))
                if path == output and not difference <= LARGEST_DIFFERENCE:
                    raise QAError(f"{path}: its logits would differ from the model's by {difference:.1g}")
                size = file.stat().st_size / 1e6
                print(f"{path}: {size:.1f} MB, logits differ from the model's by at most {difference:.1g}", flush=True)
            for file in Path(folder).iterdir():  # beside a model of more than 1.5 GB there is a file with its weights
                os.replace(file, output.with_name(file.name))

    if args.validation_file:
        for name, run in runs.items():
            f1, speed = evaluate(run, examples, features, tokenizer, answers)
            print(f"{name}: f1 {f1:.2f}, {speed:.1f} windows a second", flush=True)


def sample(tokenizer, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, half of the last sequence padding."""
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(len(tokenizer), (batch, length), generator=generator)
    attention_mask, token_type_ids = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    attention_mask[-1, length // 2 + 1 :] = 0
    token_type_ids[:, length // 4 :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    return {name: inputs[name] for name in tokenizer.model_input_names}


def write_onnx(model, batch: dict[str, torch.Tensor], file: Path) -> None:
    """`batch`: of more than one sequence and token; a size of 1 would be the graph's."""
    taken = inspect.signature(model.forward).parameters
    batch = {name: tensor for name, tensor in batch.items() if name in taken}
    shapes = dict.fromkeys(batch, {0: "batch", 1: "length"})
    settings = {"output_names": OUTPUTS, "dynamic_shapes": shapes, "dynamo": True, "verbose": False}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, kwargs=batch, **settings).save(file)


def run_of_model(model):
    """A function from a batch to start and end logits, (2, batch, length)."""
    return torch.inference_mode()(lambda batch: torch.stack(model(**batch)[:2]))


def run_of_file(file: Path):
    """The same function in onnxruntime, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(batch):
        logits = session.run(OUTPUTS, {each.name: batch[each.name].numpy() for each in session.get_inputs()})
        return torch.stack([torch.from_numpy(each) for each in logits])

    return run


def evaluate(run, examples, features, tokenizer, answers: AnswerSettings) -> tuple[float, float]:
    """f1 in percent, and windows a second of `run` alone."""
    collate = QADataCollator(tokenizer)
    search = AnswerSearch(examples, features, answers)
    by_length = torch.tensor(column(features, "length").to_numpy()).argsort()
    seconds = 0.0
    for window in by_length.split(WINDOWS_PER_BATCH):
        batch = collate([features[i] for i in window.tolist()])
        start = time.perf_counter()
        logits = run(batch)
        seconds += time.perf_counter() - start
        search.keep(search.find(window, *logits))
    scores = squad_scores(examples, search.predictions(), answers.null_score_diff_threshold)
    return scores["f1"], len(features) / seconds


if __name__ == "__main__":
    main()
