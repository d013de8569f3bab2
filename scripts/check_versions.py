"""Does a saved model load, train and answer through its pipeline alike in every transformers 5? A line for each.

python scripts/check_versions.py [--versions 5.0.0 5.24.0]

Saves small models, and loads them in each version, which gets an environment of its own with all other packages from
the one that runs this: the code beside the weights (transformers 4 needs none) must give the same logits, loss,
gradients and answers. Where transformers has a question-answering pipeline of its own (before 5.3), that must go on
without trust_remote_code for the model with absolute positions. Exit status 1 if any line is not ok.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizer,
    pipeline,
)
from transformers.pipelines import get_supported_tasks

VERSIONS = (  # of each minor one or more
    "5.0.0 5.1.0 5.2.0 5.3.0 5.4.0 5.5.4 5.6.2 5.7.0 5.8.1 5.9.0 5.10.4 5.11.0 5.12.1 5.13.1 5.14.1 5.15.1 5.16.1 "
    "5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0 4.57.6"
).split()
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris")
SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
SIZES |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ASKED = {"question": ["paris ?", "[extra] paris"], "context": 20 * "paris [extra] ", "top_k": 5}
TOLERANCE = 1e-4  # of the norm of the logits, the loss or a gradient


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="(those of each minor)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="check what was saved in DIR, with this Python only")
    args = parser.parse_args(argv)
    if args.folder:
        print(json.dumps(check_folder(args.folder)))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "saved")
        save_models(folder)
        return 0 if all([check_version(version, Path(temporary), folder) for version in args.versions]) else 1


def check_version(version: str, environments: Path, folder: Path) -> bool:
    """Prints the line of one version; is it ok?"""
    try:
        report = run_check(environment_python(environments, version), folder)
    except subprocess.CalledProcessError as error:
        report = {"transformers": version, "failures": error.stderr.strip().splitlines()[-1:] or ["ended"]}
    if report["transformers"] != version:
        report["failures"].append(f"the environment has transformers {report['transformers']}")
    how = "without" if version.startswith("4.") else "with"
    says = "FAILED  " + "; ".join(report["failures"])
    if not report["failures"]:
        pipelines = " and ".join(dict.fromkeys(report["pipelines"]))
        says = (
            f"ok      {how} trust_remote_code, logits differ by {report['difference']:.0e}; asked {pipelines} pipeline"
        )
    print(f"{version:<8} {says}", flush=True)
    return not report["failures"]


def environment_python(environments: Path, version: str) -> str:
    """The Python of a new environment with that transformers."""
    environment = environments / version
    venv.create(environment)
    paths = sysconfig.get_paths("venv", {"base": str(environment)})
    python = str(Path(paths["scripts"], "python"))
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(paths["purelib"], "from_the_one_that_runs_this.pth").write_text("\n".join(here) + "\n")
    output_of([sys.executable, "-m", "pip", "--python", python, "install", "-q", f"transformers=={version}"])
    return python


def run_check(python: str, folder: Path) -> dict:
    """What `check_folder` finds in another Python; CalledProcessError if it comes to no end there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies the code to
        environment |= {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [python, str(Path(__file__).resolve()), "--folder", str(folder)]
        return json.loads(output_of(command, env=environment, cwd=modules).splitlines()[-1])


def output_of(command: list[str], **settings) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **settings).stdout


def save_models(folder: Path) -> None:
    """A model of each position type, one with positions resized from 16 to 40, one as Google names weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qa.load_model import rename_extra_special_tokens, resize_position_embeddings
    from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
    from qa.question_answering_pipeline import QuestionAnsweringPipeline

    transformers.logging.disable_progress_bar()
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)})
    tokenizer.add_special_tokens({"extra_special_tokens": ["[extra]"]})
    resized = "relative_key_query resized"
    for name, positions in (("absolute", 40), ("relative_key", 40), ("relative_key_query", 40), (resized, 16)):
        settings = dict(max_position_embeddings=positions, position_embedding_type=name.split()[0])
        torch.manual_seed(0)
        model_class = BertForQuestionAnswering if name == "absolute" else RelativeBertForQuestionAnswering
        model = model_class(BertConfig(**SIZES, **settings)).eval()
        for key, parameter in model.named_parameters():  # weights so large that every one of them counts
            mean = 1.0 if key.endswith("LayerNorm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean, std=1.0 if "embedding" in key else 0.3)
        resize_position_embeddings(model, tokenizer, 40)
        model.config.qa_settings = {"max_seq_len": 24, "doc_stride": 8}
        asked = QuestionAnsweringPipeline(model, tokenizer, device="cpu")
        asked.save_pretrained(folder / name)
        (folder / name / "answers.json").write_text(json.dumps(asked(**ASKED)))
        rename_extra_special_tokens(folder / name)
        save_file(results(model), folder / name / "expected.safetensors")

    googles = shutil.copytree(folder / "relative_key_query", folder / "relative_key_query as Google names weights")
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in load_file(googles / "model.safetensors").items()
    }
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    weights["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    weights["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(32)
    save_file(weights, googles / "model.safetensors", metadata={"format": "pt"})


def check_folder(folder: Path) -> dict:
    """The checks of all that `save_models` has saved; failures are in words."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = {"transformers": transformers.__version__, "failures": [], "difference": 0.0, "pipelines": []}
    for saved, attention in itertools.product(sorted(folder.iterdir()), ("eager", "sdpa")):
        try:
            report["difference"] = max(report["difference"], check_model(saved, attention))
            if attention == "sdpa":
                report["pipelines"] += check_pipelines(saved)
        except Exception as error:
            words = " ".join(f"{saved.name}, {attention}: {type(error).__name__}: {error}".split())
            report["failures"].append(words)
    return report


def check_model(saved: Path, attention: str) -> float:
    """Loads one folder and raises at the first thing that differs; the largest difference of a start logit."""
    is_4 = transformers.__version__.startswith("4.")
    settings = {"attn_implementation": attention} | ({} if is_4 else {"trust_remote_code": True})
    expected = load_file(saved / "expected.safetensors")
    model = AutoModelForQuestionAnswering.from_pretrained(saved, **settings)
    if not is_4 and saved.name != "absolute":
        check("transformers_modules" in type(model).__module__, f"{type(model)} is not from beside the weights")
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        check(frozen == ["bert.embeddings.position_embeddings.weight"], f"the parameters without gradient are {frozen}")
    compare(results(model), expected, "loaded")
    ids = AutoTokenizer.from_pretrained(saved)("paris [extra]").input_ids
    check(ids == [2, 5, 6, 3], f"the tokenizer gives {ids}")

    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        names = load_file(Path(again, "model.safetensors")).keys() - model.state_dict().keys()
        # transformers' own BERT does before 5.3.
        check(not names or saved.name == "absolute", f"saves weights under other names: {sorted(names)}")
        model_again = AutoModelForQuestionAnswering.from_pretrained(again, **settings)
    compare(results(model_again), expected, "saved and loaded again")
    for reentrant in (False, True):
        model_again.gradient_checkpointing_enable({"use_reentrant": reentrant})
        on = any(getattr(module, "gradient_checkpointing", False) for module in model_again.modules())
        check(on, "gradient checkpointing stays off")
        compare(results(model_again), expected, f"gradient checkpointing, use_reentrant {reentrant}")
    if attention == "eager":
        outputs = model.eval()(**small_batch(), output_attentions=True, output_hidden_states=True)
        shapes = [tuple(each.shape) for each in (*outputs.attentions, *outputs.hidden_states)]
        expected_shapes = 2 * [(3, 2, 23, 23)] + 3 * [(3, 23, 32)]
        check(shapes == expected_shapes, f"attentions and hidden states have shapes {shapes}")
    return (results(model)["start_logits"] - expected["start_logits"]).abs().max().item()


def check_pipelines(saved: Path) -> list[str]:
    """Asks through the pipelines that there are, and names them."""
    checked = []
    if "question-answering" in get_supported_tasks() and saved.name == "absolute":
        answer = pipeline("question-answering", model=str(saved), device="cpu")(question="paris ?", context="paris")
        check(answer["answer"] == "paris", f"transformers' own pipeline answers {answer}")
        checked.append("transformers' own")
    if not transformers.__version__.startswith("4."):
        answers = pipeline(model=str(saved), trust_remote_code=True, device="cpu")(**ASKED)
        expected = json.loads((saved / "answers.json").read_text())
        for got, wanted in zip(sum(answers, []), sum(expected, []), strict=True):
            same = abs(got.pop("score") - wanted.pop("score")) < TOLERANCE and got == wanted
            check(same, f"the pipeline answers {got}, not {wanted}")
        checked.append("the model's")
    return checked


def check(condition: bool, failure: str) -> None:
    if not condition:
        raise AssertionError(failure)


def small_batch() -> dict:
    """Three windows of 23 tokens, two of them shorter and padded."""
    mask = torch.arange(23) < torch.tensor([[23], [11], [22]])
    return {
        "input_ids": torch.randint(5, 60, (3, 23), generator=torch.Generator().manual_seed(0)),
        "token_type_ids": (torch.arange(23) > 8).long().expand(3, 23).contiguous(),
        "attention_mask": mask.long(),
        "start_positions": torch.tensor([3, 1, 22]),
        "end_positions": torch.tensor([5, 1, 23]),  # the last is no token
    }


def results(model) -> dict:
    """Logits, loss and gradients of `small_batch`, by name."""
    outputs = model.train()(**small_batch())  # there is no dropout
    model.zero_grad()
    outputs.loss.backward()
    tensors = {name: outputs[name].detach() for name in ("start_logits", "end_logits", "loss")}
    return tensors | {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(tensors: dict, expected: dict, when: str) -> None:
    """Raises AssertionError, naming the tensor, for one that is missing, not finite or too far off."""
    missing = sorted(tensors.keys() ^ expected.keys())
    check(not missing, f"{when}: {missing} are on one side only")
    for name, tensor in tensors.items():
        off = (tensor - expected[name]).norm()
        allowed = TOLERANCE * expected[name].norm() + 1e-5  # some gradients are zero but for rounding
        check(off <= allowed, f"{when}: {name} is off by {off:.1e}, and {allowed:.1e} is allowed")


if __name__ == "__main__":
    sys.exit(main())
