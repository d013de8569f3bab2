"""What this project costs, beside what it replaces. Each subcommand prints a table and can write its rows as JSON.

python scripts/benchmark.py attention [--sizes base large] [--lengths 160x10 384x4 512x4] [--repeats 8] [--json FILE]
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_attention_command(commands)
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        write_rows(args.json, rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(temporary, path)


# Relative against absolute positions, one BERT layer


def add_attention_command(commands) -> None:
    parser = commands.add_parser(
        "attention",
        help="one BERT layer with relative positions: ours, the plain formula, absolute positions under sdpa",
    )
    parser.add_argument("--sizes", nargs="+", choices=("base", "large"), default=["base", "large"])
    parser.add_argument("--lengths", nargs="+", default=["160x10", "384x4", "512x4"], help="length x batch size")
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
        for length, batch in (map(int, shape.split("x")) for shape in args.lengths):
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
    added = (peaks[0] - peaks[1]) / (peaks[2] - peaks[1])  # what relative positions add, as a share of the reference's
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

    from modeling_relative_bert import RelativeBertSelfAttention

    hidden, heads = {"base": (768, 12), "large": (1024, 16)}[size]
    layers = {}
    for position_type in ("absolute", "relative_key", "relative_key_query"):
        config = BertConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=max(512, length),
            position_embedding_type=position_type,
            attn_implementation="sdpa",
        )
        layers[position_type] = BertLayer(config)
        if position_type != "absolute":
            layers[position_type].attention.self = RelativeBertSelfAttention(config)
            layers[f"{position_type} reference"] = BertLayer(config)
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

    from modeling_relative_bert import RelativeBertSelfAttention

    class ReferenceSelfAttention(RelativeBertSelfAttention):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
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
            layer.zero_grad()
            hidden.grad = None
            layer(hidden).sum().backward()

    return step


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


if __name__ == "__main__":
    main()
