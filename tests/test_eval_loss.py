"""The loss of the evaluation windows, against the loss that the model itself computes of each window alone."""

import functools
import json
import math
import os
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_utils_qa import CONTEXT, WINDOW, as_datasets
from tiny import PEOPLE, TOWNS, tiny_bert, tiny_questions
from transformers import BertForQuestionAnswering, Trainer

from qa.load_model import load_tokenizer
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.read_squad import read_squad_file
from qa.windows import WindowSettings, make_features, make_train_features
from utils_qa import WINDOWS_PER_MERGE, AnswerSearch, AnswerSettings

WINDOWS = WindowSettings(max_seq_length=24, doc_stride=5)
FLAGS = "--max_seq_length 24 --doc_stride 5 --version_2_with_negative".split()
MODELS = {"absolute": BertForQuestionAnswering, "relative_key_query": RelativeBertForQuestionAnswering}


def read(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def questions(file: Path) -> str:
    """19 questions with three golds in different places, one or none, on contexts of one to nine windows."""
    rows = []
    for i in range(19):
        person, town = PEOPLE[i % 8], TOWNS[3 * i % 8]
        context = f"{person} lives in {town} ." + " every day a baker goes to the market by bus ." * (i % 5)
        golds = [town] if i % 5 == 0 else ["bus", town, "every day"][i % 3 :] + ["baker"] if i % 4 else []
        answers = {"text": golds, "answer_start": [context.rindex(gold) for gold in golds]}
        rows.append({"id": f"q{i}", "question": "where ?", "context": context, "answers": answers})
    file.write_text(json.dumps(rows))
    return str(file)


def labels_of(window: dict, golds: dict) -> tuple[int, int]:
    """Where the first gold stands in the window, (0, 0) where it does not, a token at a time."""
    if golds["text"]:
        start = golds["answer_start"][0]
        end = start + len(golds["text"][0])
        if start in window["char_starts"] and end in window["char_ends"]:
            first, last = window["char_starts"].index(start), window["char_ends"].index(end)
            return window["context_start"] + first, window["context_start"] + last
    return 0, 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = {}
    for position_type in MODELS:
        models[position_type] = tiny_bert(folder / position_type, position_type)
        file = Path(models[position_type], "model.safetensors")
        weights = load_file(file)
        weights["qa_outputs.weight"] *= 100  # else all losses are about the same
        save_file(weights, file, metadata={"format": "pt"})
    return {**models, "dev": questions(folder / "dev.json"), "train": tiny_questions(folder / "train.json", 8)}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    """The mean of the models' own losses, one window at a time, by position type.

    And under "no gold" the questions with a window that does not hold their gold answer.
    """
    examples = read_squad_file(inputs["dev"], cache_dir=str(tmp_path_factory.mktemp("cache")))
    features = make_features(examples, load_tokenizer(inputs["absolute"]), WINDOWS)
    labels = [labels_of(window, examples[window["example_index"]]["answers"]) for window in features]
    lengths = features["length"]
    assert len(features) == 61 and min(lengths) < max(lengths) == 24
    assert 10 < sum(label == (0, 0) for label in labels) < 51
    losses = {}
    for position_type, model_class in MODELS.items():
        model = model_class.from_pretrained(inputs[position_type]).eval()
        losses[position_type] = []
        for window, (start, end) in zip(features, labels, strict=True):
            row = {name: torch.tensor([window[name]]) for name in ("input_ids", "token_type_ids")}
            gold = {"start_positions": torch.tensor([start]), "end_positions": torch.tensor([end])}
            with torch.no_grad():
                losses[position_type].append(model(**row, **gold).loss.item())
        assert np.std(losses[position_type]) > 0.1
    no_gold = {examples[i]["id"] for i, label in zip(features["example_index"], labels, strict=True) if not any(label)}
    return {**{position_type: np.mean(values) for position_type, values in losses.items()}, "no gold": no_gold}


def evaluate(out, *flags, processes=1, **how):
    flags = ["--do_eval", "--output_dir", out, "--cache_dir", f"{out}_cache", *flags]
    done = launch.run(*FLAGS, *flags, processes=processes, **how)
    assert done.exit_codes == [0] * processes, done.err[0][-2000:]
    return done


def count_forward_passes():
    forward = BertForQuestionAnswering.forward

    @functools.wraps(forward)
    def counted(self, **inputs):
        assert not any("position" in name or "gold" in name for name in inputs), inputs.keys()
        with open(os.environ["FORWARD"] + os.environ.get("RANK", "0"), "a") as file:
            file.write("x")
        return forward(self, **inputs)

    BertForQuestionAnswering.forward = counted


@pytest.mark.parametrize("position_type", MODELS)
@pytest.mark.parametrize("batch, processes", [(1, 1), (3, 1), (8, 1), (3, 2), (8, 2)])
def test_it_is_the_models_own_loss_of_each_window_alone(batch, processes, position_type, inputs, reference, tmp_path):
    """61 windows, which fill no last batch but that of one window a batch; those are padded to the length of all."""
    flags = ["--model_name_or_path", inputs[position_type], "--validation_file", inputs["dev"]]
    flags += ["--pad_to_max_length"] * (batch == 1)
    how = {"patch": "test_eval_loss.count_forward_passes", "FORWARD": str(tmp_path / "passes")}
    how = how if position_type == "absolute" else {}
    done = evaluate(tmp_path, *flags, "--per_device_eval_batch_size", batch, processes=processes, **how)
    for file in ("eval_results.json", "all_results.json"):
        assert read(tmp_path, file)["eval_loss"] == pytest.approx(reference[position_type], abs=1e-5)
    assert "loss" not in done.out[0] and '"best_f1_thresh"' in done.out[0]
    for rank in range(processes if how else 0):
        assert len((tmp_path / f"passes{rank}").read_text()) == math.ceil(61 / (batch * processes))


def test_it_is_the_same_in_training(inputs, tmp_path):
    flags = ["--validation_file", inputs["dev"], "--train_file", inputs["train"], "--do_train", "--num_train_epochs", 2]
    flags += ["--model_name_or_path", inputs["absolute"], "--eval_strategy", "epoch", "--learning_rate", "1e-2"]
    evaluate(tmp_path / "out", *flags)
    history = read(tmp_path, "out", "trainer_state.json")["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert read(tmp_path, "out", "eval_results.json")["eval_loss"] == losses[1]


def test_questions_to_be_answered_only_have_none(inputs, tmp_path):
    out, test = tmp_path / "out", tiny_questions(tmp_path / "test.json", answers=False)
    flags = ["--model_name_or_path", inputs["absolute"], "--do_predict", "--output_dir", out, *FLAGS]
    for file, has_loss in ((test, False), (inputs["dev"], True)):
        assert launch.run(*flags, "--test_file", file).exit_codes == [0]
        assert ("predict_loss" in read(out, "predict_results.json")) == has_loss


def test_gold_tokens_of_evaluation_are_the_labels_of_training(inputs, tmp_path):
    """Those of the first gold alone, whatever order they stand in."""
    examples = read_squad_file(inputs["dev"], cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(inputs["absolute"])
    train, evaluation = (make(examples, tokenizer, WINDOWS)[:] for make in (make_train_features, make_features))
    assert train["start_positions"] == evaluation["gold_start"] and train["end_positions"] == evaluation["gold_end"]
    columns = make_features(examples.remove_columns("answers"), tokenizer, WINDOWS).column_names
    assert "gold_start" not in columns and "gold_end" not in columns


def labelled_windows(gold_start, gold_end) -> tuple[Dataset, Dataset]:
    """Examples and features: one window a question."""
    windows = [{**WINDOW, "example_index": i} for i in range(len(gold_start))]
    examples, features = as_datasets([{"id": f"q{i}", "context": CONTEXT} for i in range(len(windows))], windows)
    for name, positions in (("gold_start", gold_start), ("gold_end", gold_end)):
        features = features.add_column(name, np.array(positions, np.int32))
    return examples, features


def test_of_many_windows_in_any_batches_it_is_exactly_the_same():
    """More than are merged at once; against log sums in float64."""
    rng = np.random.default_rng(0)
    windows, width = 3 * WINDOWS_PER_MERGE - 5, 9
    logits = rng.normal(0, 5, (2, windows, width)).astype(np.float32)
    gold = rng.integers(0, WINDOW["length"], (2, windows))
    examples, features = labelled_windows(*gold)
    inside = logits[:, :, : WINDOW["length"]].astype(np.float64)
    picked = np.take_along_axis(inside, gold[:, :, None], axis=2)[:, :, 0]
    expected = (np.log(np.exp(inside).sum(axis=2)) - picked).mean()
    found = set()
    for size in (1, 7, 300):
        search = AnswerSearch(examples, features, AnswerSettings())
        for batch in np.array_split(rng.permutation(windows), math.ceil(windows / size)):
            search.keep(search.find(torch.from_numpy(batch), *torch.from_numpy(logits[:, batch])))
        found.add(search.loss())
    assert len(found) == 1 and found.pop() == pytest.approx(expected, abs=1e-6)


def test_gold_answers_that_do_not_stand_at_their_place_are_named(inputs, tmp_path):
    """They change neither what is scored nor what is evaluated; a text alone is labelled as no answer."""
    rows = read(inputs["dev"])
    rows[5]["answers"]["answer_start"][0] += 1
    for row in rows[10:12]:
        row["answers"] = row["answers"]["text"]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    flags = ["--model_name_or_path", inputs["absolute"], "--validation_file"]
    done = evaluate(tmp_path / "out", *flags, tmp_path / "dev.json")
    assert "3 of 19 validation questions have a first answer that does not stand" in done.err[0]
    assert "first ids: q5, q10, q11\n" in done.err[0]
    evaluate(tmp_path / "plain", *flags, inputs["dev"])
    results, plain = (read(tmp_path, out, "eval_results.json") for out in ("out", "plain"))
    assert results["eval_f1"] == plain["eval_f1"] and results["eval_loss"] != plain["eval_loss"]


# ---- A gold answer that the model rules out ----


@pytest.mark.parametrize("position, ids", [(3, ["q0"]), (0, ["q1"]), (2, []), (6, [])])
def test_a_gold_token_of_no_probability(position, ids):
    """The tokens at 2 and 6 are none of the golds; what lies behind the window is nowhere."""
    search = AnswerSearch(*labelled_windows([3, 0, 4], [4, 0, 4]), AnswerSettings())
    logits = torch.linspace(-1, 1, 9).repeat(3, 1)
    logits[:, position] = -math.inf
    logits[:, 7:] = math.inf  # padding
    search.keep(search.find(torch.tensor([2, 0, 1]), logits, torch.linspace(1, 0, 9).repeat(3, 1)))
    assert search.unlikely_ids() == ids
    assert math.isinf(search.loss()) == bool(ids)


def rule_out_position_0():
    original = Trainer.prediction_step

    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = original(self, *args, **kwargs)
        logits[0][:, 0] = -math.inf
        return loss, logits, labels

    Trainer.prediction_step = prediction_step


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_infinite_is_left_out_or_stops_the_run_that_needs_it(processes, inputs, reference, tmp_path):
    """As of a model that masks [CLS], whose answers are good all the same; JSON has no infinity."""
    flags = ["--model_name_or_path", inputs["absolute"], "--validation_file", inputs["dev"]]
    flags += ["--version_2_with_negative", "False"]
    how = {"processes": processes, "patch": "test_eval_loss.rule_out_position_0"}
    done = evaluate(tmp_path / "out", *flags, **how)
    (line,) = [line for line in "".join(done.err).splitlines() if "eval_loss" in line]
    count = len(reference["no gold"])
    assert 3 < count < 19 and f"there is no eval_loss: the model rules out the gold answers to {count} quest" in line
    assert "eval_loss" not in read(tmp_path, "out", "eval_results.json")
    assert read(tmp_path, "out", "eval_results.json")["eval_total"] == 19

    flags += ["--do_train", "--train_file", inputs["train"], "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--output_dir", tmp_path / "train"]
    stopped = launch.run(*FLAGS, *flags, **how)
    assert stopped.exit_codes == [1] * processes and "Traceback" not in "".join(stopped.err)
    line = stopped.err[0].strip().splitlines()[-1]
    assert line.startswith("run_squad.py: error: there is no eval_loss") and "another --metric_for_best_model" in line
