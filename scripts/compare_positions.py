"""The tables and the pictures of compare_positions.sh, from OUTPUT_DIR/seed-SEED/{absolute,relative_key,...}."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt

POSITION_TYPES = {"absolute": "#7a7f87", "relative_key": "#e08a1e", "relative_key_query": "#2456b8"}  # their colours
WAYS = {"windows": "many short windows", "one_window": "one long window"}  # of reading a text, by folder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="compare_positions.py", description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("seeds", nargs="+", metavar="SEED")
    parser.add_argument("--times", nargs="+", type=int, default=[], help="the longer texts, in windows of training")
    args = parser.parse_args(argv)
    seeds = [args.output_dir / f"seed-{seed}" for seed in args.seeds]
    print(table(seeds))
    curves = {name: [read_curve(seed / name) for seed in seeds] for name in POSITION_TYPES}
    draw(curves, args.output_dir / "f1_over_steps.png", xlabel="step", xlim=(0, None))
    if args.times:
        longer = read_longer_texts(seeds, args.times)
        print(f"\n{table_of_longer_texts(longer, args.times)}")
        # Absolute positions end with the window of training.
        curves = {f"{name}, {WAYS[way]}": f1 for (name, way), f1 in longer.items() if len(f1[0]) == len(args.times)}
        label = "length of the text, in windows of training"
        draw(curves, args.output_dir / "f1_over_length.png", xlabel=label, xscale="log", xticks=args.times)


def fail(message: str) -> NoReturn:
    print(f"compare_positions.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(folder: Path, name: str) -> dict:
    if not (folder / name).exists():
        fail(f"{folder} lacks {name}: run compare_positions.sh again")
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_curve(run: Path) -> dict[int, float]:
    """f1 by step, in the end that of the saved model."""
    state = read_json(run, "trainer_state.json")
    curve = {entry["step"]: entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry}
    return curve | {state["global_step"]: read_json(run, "eval_results.json")["eval_f1"]}


def read_longer_texts(seeds: list[Path], times: list[int]) -> dict[tuple[str, str], list[dict[int, float]]]:
    """By position type and way, for each seed: f1 by how many times as long as a window of training the texts are.

    Absolute positions end with the window of training, and a text that fills just one window is read in one way.
    """
    longer = {}
    for position_type in POSITION_TYPES:
        for way in WAYS:
            read = [n for n in times if n == 1 or way == "windows" or position_type != "absolute"]
            folders = {n: Path(position_type, f"texts_x{n}", way if n > 1 else "windows") for n in read}
            longer[position_type, way] = [
                {n: read_json(seed / folder, "eval_results.json")["eval_f1"] for n, folder in folders.items()}
                for seed in seeds
            ]
    return longer


def table(seeds: list[Path]) -> str:
    """Mean and sample standard deviation over seeds of f1 and exact, and the lowest and highest f1."""
    steps, rows = [], []
    for position_type in POSITION_TYPES:
        results = [read_json(seed / position_type, "eval_results.json") for seed in seeds]
        # Each seed has paragraphs of its own, and so a few steps more or less.
        steps.append([read_json(seed / position_type, "trainer_state.json")["global_step"] for seed in seeds])
        f1, exact = ([result[name] for result in results] for name in ("eval_f1", "eval_exact"))
        spread = f"{statistics.stdev(f1):.2f}" if len(f1) > 1 else "-"
        figures = [f"{figure:.2f}" for figure in (min(f1), max(f1), statistics.mean(exact))]
        rows.append([position_type, f"{statistics.mean(f1):.2f}", spread, *figures])
    if steps != [steps[0]] * len(steps):
        fail(f"the runs have {steps} steps, by position type and seed: not one budget")
    heads = ["positions", "f1 mean", "f1 sd", "f1 lowest", "f1 highest", "exact mean"]
    ends = " to ".join(map(str, sorted({min(steps[0]), max(steps[0])})))
    return f"{len(seeds)} seed(s), {ends} steps\n\n{markdown(heads, rows)}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def table_of_longer_texts(longer: dict[tuple[str, str], list[dict[int, float]]], times: list[int]) -> str:
    """Mean and sample standard deviation over seeds of f1, by length of the texts."""
    rows = []
    for (position_type, way), of_seeds in longer.items():
        cells = []
        for n in times:
            f1 = [curve[n] for curve in of_seeds if n in curve]
            cells.append(f"{statistics.mean(f1):.1f}" if f1 else "cannot")
            cells[-1] += f" ± {statistics.stdev(f1):.1f}" if len(f1) > 1 else ""
        rows.append([position_type, WAYS[way], *cells])
    return markdown(["positions", "read in", *(f"x{n}" for n in times)], rows)


def draw(curves: dict[str, list[dict[int, float]]], path: Path, **axis) -> None:
    """A thin line for each seed, a thick one for their mean, dashed for one long window. `axis`: of the x axis."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, of_seeds in curves.items():
        color, line = POSITION_TYPES[label.split(",")[0]], "--" if WAYS["one_window"] in label else "-"
        for curve in of_seeds:
            axes.plot(list(curve), list(curve.values()), line, linewidth=0.8, alpha=0.5, color=color)
        common = sorted(set.intersection(*map(set, of_seeds)))
        means = [statistics.mean(curve[x] for curve in of_seeds) for x in common]
        axes.plot(common, means, line, linewidth=2.2, marker=".", label=label, color=color)
    axes.set(ylabel="f1 on questions that were not trained on", ylim=(0, 101), **axis)
    if "xticks" in axis:
        axes.set_xticks(axis["xticks"], [f"x{n}" for n in axis["xticks"]])
        axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\n{path.stem.replace('_', ' ')}: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
