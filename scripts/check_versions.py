"""Does a saved model with relative positions load, answer and train alike in every transformers 5? A line for each.

python scripts/check_versions.py [--versions 5.0.0 5.24.0] [--environments DIR]

Saves small models with the transformers that runs it, and loads them in each version: the code beside the weights must
give the same logits, loss and gradients, eager and sdpa, with gradient checkpointing, and after saving and loading
again; also from a file with the names and the further weights of Google's checkpoints, and with positions that have
grown. transformers 4 loads them without that code. Each version gets an environment of its own, with all but
transformers and what that needs from the one that runs this. Exit status 1 if any line is not ok.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VERSIONS = (  # of each minor one or more
    "5.0.0 5.1.0 5.2.0 5.3.0 5.4.0 5.5.4 5.6.2 5.7.0 5.8.1 5.9.0 5.10.4 5.11.0 5.12.1 5.13.1 5.14.1 5.15.1 5.16.1 "
    "5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0 4.57.6"
).split()
RELATIVE_TYPES = ("relative_key", "relative_key_query")
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm
POSITION_WEIGHT = "bert.embeddings.position_embeddings.weight"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="(one or more of each minor)"
    )
    parser.add_argument(
        "--environments", type=Path, metavar="DIR", help="folder to keep the environments in, for the next time (none)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="only check, in the environment that runs this, what was saved in DIR",
    )
    args = parser.parse_args(argv)
    if args.folder:
        print(json.dumps(check_folder(args.folder)))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "saved")
        save_models(folder)
        environments = (args.environments or Path(temporary, "environments")).resolve()
        return 0 if all([check_version(version, environments, folder) for version in args.versions]) else 1


def check_version(version: str, environments: Path, folder: Path) -> bool:
    """Prints the line of one version; is it ok?"""
    try:
        report = run_check(environment_python(environments, version), folder)
    except subprocess.CalledProcessError as error:
        report = {"failures": [last_line(error.stderr)]}
    if not report["failures"] and report["transformers"] != version:
        report["failures"].append(f"the environment has transformers {report['transformers']}")
    if report["failures"]:
        print(f"{version:<8} FAILED  " + "; ".join(report["failures"]), flush=True)
        return False
    how = "without" if version.startswith("4.") else "with"
    print(f"{version:<8} ok      {how} trust_remote_code, logits differ by {report['difference']:.0e}", flush=True)
    return True


def environment_python(environments: Path, version: str) -> str:
    """The Python of an environment with that transformers, made if `environments` has none.

    All other packages come from the environment that runs this, which stays as it is: its folder follows on the path.
    """
    environment = environments / f"python{sys.version_info.major}.{sys.version_info.minor}-transformers-{version}"
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    finished = environment / "finished"
    if not finished.exists():  # or making it was broken off
        shutil.rmtree(environment, ignore_errors=True)
        venv.create(environment)
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        **{"check": True, "capture_output": True, "text": True},
    ).stdout.strip()
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(site_packages, "from_the_one_that_runs_this.pth").write_text("\n".join(here) + "\n")
    if not finished.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", f"transformers=={version}"],
            **{"check": True, "capture_output": True, "text": True},
        )
        finished.touch()
    return python


def run_check(python: str, folder: Path) -> dict:
    """What `check_folder` finds in another Python; CalledProcessError if it comes to no end there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies the code to
        environment |= {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [python, str(Path(__file__).resolve()), "--folder", str(folder)]
        finished = subprocess.run(command, env=environment, cwd=modules, check=True, capture_output=True, text=True)
    return json.loads(last_line(finished.stdout))


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["ended without a word"])[-1]


def save_models(folder: Path) -> None:
    """Saves each relative type, as built and grown from 16 positions to 40, and the second as Google names weights."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertTokenizer

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qa.load_model import resize_position_embeddings
    from qa.modeling_relative_bert import RelativeBertForQuestionAnswering

    transformers.logging.disable_progress_bar()
    for position_type, positions in itertools.product(RELATIVE_TYPES, (16, 40)):
        config = BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            position_embedding_type=position_type,
        )
        torch.manual_seed(0)
        model = RelativeBertForQuestionAnswering(config)
        for name, parameter in model.named_parameters():  # weights so large that every one of them counts
            mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean, std=1.0 if "embedding" in name else 0.3)
        name = position_type if positions == 40 else f"{position_type} grown"
        resize_position_embeddings(model, BertTokenizer(vocab={"[UNK]": 0}), 40)
        model.save_pretrained(folder / name)
        save_file(expected_tensors(model), folder / name / "expected.safetensors")

    googles = folder / f"{position_type} as Google names weights"
    shutil.copytree(folder / position_type, googles)
    weights = load_file(googles / "model.safetensors")
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    weights["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    weights["bert.pooler.dense.bias"] = torch.zeros(32)
    weights["cls.predictions.bias"] = torch.zeros(60)
    weights["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(32)
    save_file(weights, googles / "model.safetensors", metadata={"format": "pt"})


def small_batch() -> dict:
    """Three windows of 23 tokens, two of them shorter and padded."""
    import torch

    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 23, dtype=torch.long)
    mask[1, 11:] = 0
    mask[2, 22:] = 0
    return {
        "input_ids": torch.randint(5, 60, (3, 23), generator=generator),
        "token_type_ids": (torch.arange(23) > 8).long().expand(3, 23).contiguous(),
        "attention_mask": mask,
        "start_positions": torch.tensor([3, 1, 22]),
        "end_positions": torch.tensor([5, 1, 23]),  # the last is no token
    }


def expected_tensors(model) -> dict:
    """Logits, loss and gradients of `small_batch`, by name."""
    outputs = model.train()(**small_batch())  # there is no dropout
    model.zero_grad()
    outputs.loss.backward()
    tensors = {name: outputs[name].detach() for name in ("start_logits", "end_logits", "loss")}
    tensors |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors


def check_folder(folder: Path) -> dict:
    """The checks of all that `save_models` has saved, in the environment that runs this; failures are in words."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = {"transformers": transformers.__version__, "failures": [], "difference": 0.0}
    for saved in sorted(path for path in folder.iterdir() if path.is_dir()):
        for attention in ("eager", "sdpa"):
            try:
                difference = check_model(saved, attention)
                report["difference"] = max(report["difference"], difference)
            except Exception as error:
                words = str(error).strip().splitlines() or [""]
                report["failures"].append(f"{saved.name}, {attention}: {type(error).__name__}: {words[0]}")
    return report


def check_model(saved: Path, attention: str) -> float:
    """Loads one folder and raises at the first thing that differs; the largest difference of a logit or the loss."""
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForQuestionAnswering

    is_4 = transformers.__version__.startswith("4.")
    settings = {"attn_implementation": attention} | ({} if is_4 else {"trust_remote_code": True})
    expected = load_file(saved / "expected.safetensors")
    model = AutoModelForQuestionAnswering.from_pretrained(saved, **settings)
    if not is_4:
        if "transformers_modules" not in type(model).__module__:
            raise AssertionError(f"{type(model)} is not from the code beside the weights")
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        if frozen != [POSITION_WEIGHT]:
            raise AssertionError(f"{frozen} take no gradient, not {POSITION_WEIGHT} alone")
    difference = compare(expected_tensors(model), expected, "loaded")

    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        names = set(load_file(Path(again, "model.safetensors")))
        if names != set(model.state_dict()):
            raise AssertionError(f"saves weights under other names: {sorted(names - set(model.state_dict()))}")
        model_again = AutoModelForQuestionAnswering.from_pretrained(again, **settings)
    compare(expected_tensors(model_again), expected, "saved and loaded again")

    for reentrant in (False, True):
        model_again.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not any(getattr(module, "gradient_checkpointing", False) for module in model_again.modules()):
            raise AssertionError("gradient checkpointing stays off")
        compare(expected_tensors(model_again), expected, f"gradient checkpointing, use_reentrant {reentrant}")

    if attention == "eager":
        outputs = model.eval()(**small_batch(), output_attentions=True, output_hidden_states=True)
        shapes = [tuple(each.shape) for each in (*outputs.attentions, *outputs.hidden_states)]
        if shapes != 2 * [(3, 2, 23, 23)] + 3 * [(3, 23, 32)]:
            raise AssertionError(f"attentions and hidden states have shapes {shapes}")
    return difference


def compare(tensors: dict, expected: dict, when: str) -> float:
    """Raises AssertionError, naming the tensor, for one that is missing, not finite or too far off."""
    if tensors.keys() != expected.keys():
        raise AssertionError(f"{when}: {sorted(tensors.keys() ^ expected.keys())[0]} is on one side only")
    largest = 0.0
    for name, tensor in tensors.items():
        if name.startswith("gradient"):
            # Some are zero but for rounding, such as that of a bias which shifts all scores of a query alike.
            off, allowed = (tensor - expected[name]).norm(), GRADIENT_TOLERANCE * expected[name].norm() + 1e-5
        else:
            off, allowed = (tensor - expected[name]).abs().max(), LOGIT_TOLERANCE
            largest = max(largest, off.item())
        if not off <= allowed:  # nor if it is no number
            raise AssertionError(f"{when}: {name} is off by {off:.1e}, and {allowed:.1e} is allowed")
    return largest


if __name__ == "__main__":
    sys.exit(main())
