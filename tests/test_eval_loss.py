"""The loss of the evaluation windows, against the loss that the model itself computes of each window alone."""

import json
import math

import launch
import numpy as np
import pytest
import torch
from datasets import Dataset
from test_utils_qa import CONTEXT, WINDOW, as_datasets
from tiny import tiny_bert, tiny_questions
from transformers import BertForQuestionAnswering, Trainer

from qa.load_model import load_tokenizer
from qa.read_squad import read_squad_file
from qa.windows import WindowSettings, make_features
from utils_qa import AnswerSearch, AnswerSettings

FLAGS = "--max_seq_length 24 --doc_stride 5 --version_2_with_negative --per_device_eval_batch_size 3".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    model = BertForQuestionAnswering.from_pretrained(tiny_bert(folder / "bert"))
    model.qa_outputs.weight.data *= 100  # else all losses are about the same
    model.save_pretrained(folder / "bert")
    dev = tiny_questions(folder / "dev.json", 7, version_2=True)
    return {"model": str(folder / "bert"), "dev": dev, "test": tiny_questions(folder / "test.json", answers=False)}


def run(inputs, out, *flags, processes=1, **how):
    return launch.run(
        *["--model_name_or_path", inputs["model"], "--output_dir", out, *FLAGS, *flags], processes=processes, **how
    )


def refuse_labels():
    forward = BertForQuestionAnswering.forward

    def without_labels(self, input_ids, attention_mask=None, token_type_ids=None):
        return forward(self, input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

    BertForQuestionAnswering.forward = without_labels


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_the_models_own_loss_of_each_window_alone(processes, inputs, tmp_path):
    examples = read_squad_file(inputs["dev"], cache_dir=str(tmp_path / "cache"))
    features = make_features(examples, load_tokenizer(inputs["model"]), WindowSettings(24, 5))
    model = BertForQuestionAnswering.from_pretrained(inputs["model"]).eval()
    names = ["input_ids", "token_type_ids", "start_positions", "end_positions"]
    with torch.no_grad():
        losses = [model(**{name: torch.tensor([window[name]]) for name in names}).loss.item() for window in features]
    assert len(losses) % 6 and np.std(losses) > 0.1 and 0 < sum(features["start_positions"])
    done = run(
        inputs,
        tmp_path,
        "--do_eval",
        "--validation_file",
        inputs["dev"],
        processes=processes,
        patch="test_eval_loss.refuse_labels",
    )
    assert done.exit_codes == [0] * processes, done.err[0]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_questions_without_answers_have_none(inputs, tmp_path):
    for file, has_loss in (("test", False), ("dev", True)):
        done = run(inputs, tmp_path, "--do_predict", "--test_file", inputs[file])
        assert done.exit_codes == [0], done.err[0]
        assert ("predict_loss" in json.loads((tmp_path / "predict_results.json").read_text())) == has_loss


def labelled_windows(start_positions, end_positions) -> tuple[Dataset, Dataset]:
    """Examples and features: one window a question."""
    windows = [{**WINDOW, "example_index": i} for i in range(len(start_positions))]
    examples, features = as_datasets([{"id": f"q{i}", "context": CONTEXT} for i in range(len(windows))], windows)
    for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
        features = features.add_column(name, np.array(positions, np.int32))
    return examples, features


def test_of_many_windows_in_any_batches_it_is_exactly_the_same():
    """Against log sums in float64."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (2, 763, 9)).astype(np.float32)
    labels = rng.integers(0, WINDOW["length"], (2, 763))
    inside = logits[:, :, : WINDOW["length"]].astype(np.float64)
    picked = np.take_along_axis(inside, labels[:, :, None], axis=2)[:, :, 0]
    expected = (np.log(np.exp(inside).sum(axis=2)) - picked).mean()
    found = set()
    for size in (1, 7, 300):
        search = AnswerSearch(*labelled_windows(*labels), AnswerSettings())
        for batch in torch.from_numpy(rng.permutation(763)).split(size):
            search.keep(search.find(batch, *torch.from_numpy(logits)[:, batch]))
        found.add(search.loss())
    assert len(found) == 1 and found.pop() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("position, ids", [(3, ["q0"]), (0, ["q1"]), (2, []), (6, [])])
def test_a_label_at_minus_infinity_names_the_question(position, ids):
    """The tokens at 2 and 6 are no labels; what lies behind the window is nowhere."""
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


def test_an_infinite_loss_is_left_out_or_stops_the_run_that_needs_it(inputs, tmp_path):
    """As of a model that masks [CLS], whose answers are good all the same; JSON has no infinity."""
    flags = ["--version_2_with_negative", "False", "--validation_file", inputs["dev"]]
    how = {"processes": 2, "patch": "test_eval_loss.rule_out_position_0"}
    done = run(inputs, tmp_path / "out", "--do_eval", *flags, **how)
    assert done.exit_codes == [0, 0] and "there is no eval_loss" in done.err[0]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_total"] == 14 and "eval_loss" not in results

    flags += ["--do_train", "--train_file", inputs["dev"], "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--num_train_epochs", "1"]
    stopped = run(inputs, tmp_path / "train", "--do_eval", *flags, **how)
    assert 0 not in stopped.exit_codes
    line = stopped.err[0].strip().splitlines()[-1]
    assert line.startswith("run_squad.py: error: there is no eval_loss") and "another --metric_for_best_model" in line
