"""Golden files of BERT's three position types, made with transformers 4.57.6.

    python scripts/make_golden_attention.py [--output FOLDER]

Writes for each position type a model folder as 4.57.6 saves it, tokenizer included, and one file with, for each batch,
the inputs, the logits, the loss and the gradient of every parameter that has one. The relative types have a second such
file, of a batch too long for the model, which has been given more positions: what the tables do not reach gets their
outermost rows. `check_versions.py --versions 4.57.6` loads there what this project saves.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "attention"
POSITION_TYPES = ("absolute", "relative_key", "relative_key_query")
WORDS = "who what where when in of the a is was born city river king queen paris berlin 17 ##80 ##s ##ed ? . ,".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_LENGTH = 24
BATCHES = {  # name: (length, tokens of each sequence); below, near and at MAX_LENGTH, odd and even
    "9_padded": (9, (9, 4, 7)),
    "16_full": (16, (16, 16)),
    "23_padded": (23, (23, 11, 20)),
    "24_full": (24, (24, 24)),
    "24_padded": (24, (5, 24, 13)),
}
LONGER_BATCHES = {"200_padded": (200, (200, 61))}  # of a model resized from MAX_LENGTH to LONGER_LENGTH
LONGER_LENGTH = 210


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=GOLDEN, help="folder to write (default: %(default)s)")
    output = parser.parse_args().output
    if transformers.__version__ != "4.57.6":
        sys.exit(f"this runs under transformers 4.57.6, and this is {transformers.__version__}")

    torch.set_num_threads(1)  # sums in one order, so that the same bytes are written again
    logits = {}
    for position_type in POSITION_TYPES:
        model = make_model(position_type)
        model.save_pretrained(output / position_type)
        make_tokenizer(output).save_pretrained(output / position_type)
        tensors = golden_tensors(model, BATCHES)
        save_file(tensors, output / f"{position_type}.safetensors")
        if position_type != "absolute":
            longer = golden_tensors(longer_model(model), LONGER_BATCHES)
            save_file(longer, output / f"{position_type}_longer.safetensors")
        logits[position_type] = torch.cat([tensors[f"{name}/start_logits"].flatten() for name in BATCHES])
    for one, other in itertools.combinations(POSITION_TYPES, 2):
        if (logits[one] - logits[other]).std() < 0.5:
            sys.exit(f"the logits of {one} and {other} are too much alike for these files to tell them apart")


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


def longer_model(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """The same with LONGER_LENGTH positions; row i of a new table is that of its distance, or of the nearest known."""
    distances = torch.arange(2 * LONGER_LENGTH - 1) - (LONGER_LENGTH - 1)
    rows = distances.clip(1 - MAX_LENGTH, MAX_LENGTH - 1) + MAX_LENGTH - 1
    weights = model.state_dict()
    for name in [name for name in weights if "distance_embedding" in name]:
        weights[name] = weights[name][rows]
    name = "bert.embeddings.position_embeddings.weight"
    weights[name] = nn.functional.pad(weights[name], (0, 0, 0, LONGER_LENGTH - MAX_LENGTH))
    settings = model.config.to_dict() | {"max_position_embeddings": LONGER_LENGTH, "attn_implementation": "eager"}
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


if __name__ == "__main__":
    main()
