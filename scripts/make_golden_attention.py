"""Golden files of BERT's three position types, made with transformers 4.57.6, and the exchange of saved models with it.

    python scripts/make_golden_attention.py make            under transformers 4.57.6: writes tests/golden/attention
    python scripts/make_golden_attention.py save FOLDER     in this project's environment: loads and saves those models
    python scripts/make_golden_attention.py check FOLDER    under transformers 4.57.6: loads what `save` wrote

`make` writes for each position type a model folder as 4.57.6 saves it, tokenizer included, and one file with, for each
batch, the inputs, the logits, the loss and the gradient of every parameter that has one. The relative types have a
second such file, of a batch too long for the model, which `make` has grown: what the tables do not reach gets their
outermost rows. `save` grows the same models by the program's own function. `check` exits 1 unless every weight is
found, none is left over, logits equal the golden ones and the tokenizer gives the same ids.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "attention"
POSITION_TYPES = ("absolute", "relative_key", "relative_key_query")
WORDS = "who what where when in of the a is was born city river king queen paris berlin 17 ##80 ##s ##ed ? . ,".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUESTION, CONTEXT = "When was the queen born?", "The queen of Paris was born in 1780s."
MAX_LENGTH = 24
BATCHES = {  # name: (length, tokens of each sequence); below, near and at MAX_LENGTH, odd and even
    "9_padded": (9, (9, 4, 7)),
    "16_full": (16, (16, 16)),
    "23_padded": (23, (23, 11, 20)),
    "24_full": (24, (24, 24)),
    "24_padded": (24, (5, 24, 13)),
}
LONGER_BATCHES = {"200_padded": (200, (200, 61))}  # of a model that has grown from MAX_LENGTH to GROWN_LENGTH
GROWN_LENGTH = 210


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the golden files (transformers 4.57.6)")
    make.add_argument("--output", type=Path, default=GOLDEN, help="folder to write (default: %(default)s)")
    for name, text in (("save", "save the golden models with this project"), ("check", "load them in 4.57.6")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order, so that `make` writes the same bytes again
    if args.command in ("make", "check") and transformers.__version__ != "4.57.6":
        sys.exit(f"{args.command} runs under transformers 4.57.6, this is {transformers.__version__}")
    if args.command == "make":
        return make_golden(args.output)
    if args.command == "save":
        return save_with_this_project(args.folder)
    return check_in_4_57(args.folder)


def make_golden(output: Path) -> int:
    logits = {}
    for position_type in POSITION_TYPES:
        model = make_model(position_type)
        model.save_pretrained(output / position_type)
        make_tokenizer(output).save_pretrained(output / position_type)
        tensors = golden_tensors(model, BATCHES)
        save_file(tensors, output / f"{position_type}.safetensors")
        if position_type != "absolute":
            longer = golden_tensors(grown_model(model), LONGER_BATCHES)
            save_file(longer, output / f"{position_type}_longer.safetensors")
        logits[position_type] = torch.cat([tensors[f"{name}/start_logits"].flatten() for name in BATCHES])

    for one, other in (POSITION_TYPES[:2], POSITION_TYPES[1:], POSITION_TYPES[::2]):
        spread = (logits[one] - logits[other]).std().item()
        print(f"standard deviation of the start logits' difference, {one} against {other}: {spread:.2f}")
        if spread < 0.5:
            sys.exit("the position types are too much alike for these files to tell them apart")
    return 0


def golden_tensors(model: BertForQuestionAnswering, batches: dict) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (length, tokens) in batches.items():
        inputs = make_inputs(length, tokens, seed=length + len(tokens))
        tensors |= {f"{name}/inputs/{key}": value for key, value in inputs.items()}
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        for key in ("start_logits", "end_logits", "loss"):
            tensors[f"{name}/{key}"] = outputs[key].detach()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                tensors[f"{name}/gradients/{key}"] = parameter.grad.clone()
    return tensors


def grown_model(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """The same with GROWN_LENGTH positions; row i of a new table is that of its distance, or of the nearest known."""
    distances = torch.arange(2 * GROWN_LENGTH - 1) - (GROWN_LENGTH - 1)
    rows = distances.clip(1 - MAX_LENGTH, MAX_LENGTH - 1) + MAX_LENGTH - 1
    weights = model.state_dict()
    for name in [name for name in weights if "distance_embedding" in name]:
        weights[name] = weights[name][rows]
    name = "bert.embeddings.position_embeddings.weight"
    weights[name] = nn.functional.pad(weights[name], (0, 0, 0, GROWN_LENGTH - MAX_LENGTH))
    settings = model.config.to_dict() | {"max_position_embeddings": GROWN_LENGTH, "attn_implementation": "eager"}
    grown = BertForQuestionAnswering(BertConfig(**settings))
    grown.load_state_dict(weights)
    return grown.train()


def make_model(position_type: str) -> BertForQuestionAnswering:
    """A small BERT whose weights are the same for every position type, the distance embeddings aside."""
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type=position_type,
        attn_implementation="eager",
    )
    model = BertForQuestionAnswering(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            if "LayerNorm.weight" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif "embedding" in name or "qa_outputs" in name:
                parameter.copy_(noise)
            elif "attention" in name:
                parameter.copy_((0.3 if "query" in name or "key" in name else 0.5) * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.train()


def make_inputs(length: int, tokens: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (len(tokens), length)
    mask = torch.arange(length) < torch.tensor(tokens)[:, None]  # (batch, length)
    ids = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), size, generator=generator) * mask
    types = (torch.arange(length) >= length // 3) & mask
    starts = torch.tensor([count // 2 for count in tokens])
    starts[0] = 0  # a window without the answer
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "token_type_ids": types.long(),
        "start_positions": starts,
        "end_positions": starts + (starts > 0).long(),
    }


def make_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(SPECIAL + WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(vocab), model_max_length=MAX_LENGTH)
    vocab.unlink()
    return tokenizer


def save_with_this_project(folder: Path) -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qa.load_model import rename_extra_special_tokens, resize_position_embeddings
    from qa.modeling_relative_bert import RelativeBertForQuestionAnswering

    for position_type in POSITION_TYPES:
        model_class = BertForQuestionAnswering if position_type == "absolute" else RelativeBertForQuestionAnswering
        model_class.from_pretrained(GOLDEN / position_type).save_pretrained(folder / position_type)
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / position_type)
        tokenizer.add_special_tokens({"extra_special_tokens": ["[extra]"]})
        tokenizer.save_pretrained(folder / position_type)
        rename_extra_special_tokens(folder / position_type)
        if position_type != "absolute":
            model = model_class.from_pretrained(GOLDEN / position_type)
            resize_position_embeddings(model, tokenizer, GROWN_LENGTH)
            model.save_pretrained(folder / f"{position_type}_longer")
    return 0


def check_in_4_57(folder: Path) -> int:
    failures = 0
    for position_type in POSITION_TYPES:
        worst, report = largest_difference(folder, position_type, BATCHES)
        tokenizer = AutoTokenizer.from_pretrained(folder / position_type)
        text = (QUESTION, CONTEXT + " [extra]")
        expected = AutoTokenizer.from_pretrained(GOLDEN / position_type)
        expected.add_special_tokens({"additional_special_tokens": ["[extra]"]})
        same_tokens = tokenizer(*text).input_ids == expected(*text).input_ids
        if position_type != "absolute":
            worst_longer, report_longer = largest_difference(folder, f"{position_type}_longer", LONGER_BATCHES)
            worst, report = max(worst, worst_longer), report + report_longer
        left = {key: value for key, value in report if value}
        good = worst <= 1e-5 and same_tokens and not left
        failures += not good
        print(f"{position_type}: logits differ by {worst:.1e}, same token ids: {same_tokens}, weights amiss: {left}")
    return 1 if failures else 0


def largest_difference(folder: Path, name: str, batches: dict) -> tuple[float, list]:
    """Of a logit of the model saved in folder / name from the golden ones; and what loading it reports."""
    model, report = AutoModelForQuestionAnswering.from_pretrained(folder / name, output_loading_info=True)
    if model.config.position_embedding_type != name.removesuffix("_longer"):
        sys.exit(f"{folder / name} is of position_embedding_type {model.config.position_embedding_type}")
    golden = load_file(GOLDEN / f"{name}.safetensors")
    worst = 0.0
    for batch in batches:
        inputs = {key: golden[f"{batch}/inputs/{key}"] for key in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        for key in ("start_logits", "end_logits"):
            worst = max(worst, (outputs[key] - golden[f"{batch}/{key}"]).abs().max().item())
    return worst, list(report.items())


if __name__ == "__main__":
    sys.exit(main())
