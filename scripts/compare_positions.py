"""The tables and the pictures of compare_positions.sh.

    python scripts/compare_positions.py OUTPUT_DIR SEED ... [--times TIMES ...]

reads OUTPUT_DIR/seed-SEED/{absolute,relative_key,relative_key_query}, prints the table and writes f1_over_steps.png;
with --times, of the texts that are so many times as long as a window of training, another table and
f1_over_length.png.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

try:
    import matplotlib
except ImportError:
    print("compare_positions: error: matplotlib is missing: python -m pip install matplotlib", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

POSITION_TYPES = {"absolute": "#7a7f87", "relative_key": "#e08a1e", "relative_key_query": "#2456b8"}  # their colours
WAYS = {"windows": "many short windows", "one_window": "one long window"}  # of reading a text, by folder


class Run(NamedTuple):
    exact: float
    f1: float
    steps: int
    curve: dict[int, float]  # f1 by step


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="compare_positions.py", description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("seeds", nargs="+", metavar="SEED")
    parser.add_argument("--times", nargs="+", type=int, default=[], help="the longer texts, in windows of training")
    arguments = parser.parse_args(argv)
    output_dir, times = arguments.output_dir, arguments.times
    try:
        runs = read_runs(output_dir, arguments.seeds)
        longer = read_longer_texts(output_dir, arguments.seeds, times)
    except ValueError as error:
        print(f"compare_positions.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(runs))
    draw(runs, output_dir / "f1_over_steps.png")
    print(f"\nf1 over steps: {output_dir / 'f1_over_steps.png'}")
    if times:
        print(f"\n{table_of_longer_texts(longer, times)}")
        draw_longer_texts(longer, times, output_dir / "f1_over_length.png")
        print(f"\nf1 over length: {output_dir / 'f1_over_length.png'}")


def read_runs(output_dir: Path, seeds: list[str]) -> dict[str, list[Run]]:
    """The runs of each position type, by seed. Raises ValueError where one is missing or had another budget."""
    runs = {position_type: [] for position_type in POSITION_TYPES}
    for seed in (output_dir / f"seed-{number}" for number in seeds):
        # each has paragraphs of its own, and so a few steps more or less
        for position_type in POSITION_TYPES:
            results, state = seed / position_type / "eval_results.json", seed / position_type / "trainer_state.json"
            if not (results.exists() and state.exists()):
                raise ValueError(f"{seed / position_type} holds no finished run: run compare_positions.sh again")
            scores, state = (json.loads(file.read_text(encoding="utf-8")) for file in (results, state))
            curve = {entry["step"]: entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry}
            curve[state["global_step"]] = scores["eval_f1"]
            runs[position_type].append(Run(scores["eval_exact"], scores["eval_f1"], state["global_step"], curve))
        budgets = {of_type[-1].steps for of_type in runs.values()}
        if len(budgets) > 1:
            raise ValueError(f"{seed} holds runs of {', '.join(map(str, sorted(budgets)))} steps: not one budget")
    return runs


def read_longer_texts(output_dir: Path, seeds: list[str], times: list[int]) -> dict[tuple[str, str], dict]:
    """f1 by position type and way, then by how many times as long as a window of training the texts are, then by seed.

    Raises ValueError where one is missing. Absolute positions end with the window of training, and a text that fills
    just one window is read in one way.
    """
    longer = {}
    for position_type in POSITION_TYPES:
        for way in WAYS:
            f1 = longer[position_type, way] = {}
            for factor in times:
                if way == "one_window" and factor > 1 and position_type == "absolute":
                    continue
                folder = Path(position_type, f"texts_x{factor}", way if factor > 1 else "windows")
                files = [output_dir / f"seed-{seed}" / folder / "eval_results.json" for seed in seeds]
                for file in files:
                    if not file.exists():
                        raise ValueError(f"{file.parent} holds no evaluation: run compare_positions.sh again")
                f1[factor] = [json.loads(file.read_text(encoding="utf-8"))["eval_f1"] for file in files]
    return longer


def table(runs: dict[str, list[Run]]) -> str:
    """Mean and sample standard deviation over seeds of f1 and exact, and the lowest and highest f1."""
    some = next(iter(runs.values()))
    steps = sorted({run.steps for run in some})
    lines = [
        f"{len(some)} seed(s), {steps[0]}{f' to {steps[-1]}' if len(steps) > 1 else ''} steps",
        "",
        "| positions | f1 mean | f1 sd | f1 lowest | f1 highest | exact mean |",
        "|---|---|---|---|---|---|",
    ]
    for position_type, of_type in runs.items():
        f1 = [run.f1 for run in of_type]
        spread = f"{statistics.stdev(f1):.2f}" if len(f1) > 1 else "-"
        exact = statistics.mean(run.exact for run in of_type)
        lines.append(
            f"| {position_type} | {statistics.mean(f1):.2f} | {spread} | {min(f1):.2f} | {max(f1):.2f} | {exact:.2f} |"
        )
    return "\n".join(lines)


def table_of_longer_texts(longer: dict[tuple[str, str], dict], times: list[int]) -> str:
    """Mean and sample standard deviation over seeds of f1, by length of the texts."""
    lines = [
        f"| positions | read in | {' | '.join(f'x{factor}' for factor in times)} |",
        f"|---|---|{'---|' * len(times)}",
    ]
    for (position_type, way), f1 in longer.items():
        cells = []
        for factor in times:
            of_seeds = f1.get(factor)
            cells.append(f"{statistics.mean(of_seeds):.1f}" if of_seeds else "cannot")
            if of_seeds and len(of_seeds) > 1:
                cells[-1] += f" ± {statistics.stdev(of_seeds):.1f}"
        lines.append(f"| {position_type} | {WAYS[way]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """A thin line for each seed, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for position_type, of_type in runs.items():
        colour = POSITION_TYPES[position_type]
        for run in of_type:
            axes.plot(list(run.curve), list(run.curve.values()), color=colour, linewidth=0.8, alpha=0.5)
        steps = sorted(set.intersection(*(set(run.curve) for run in of_type)))
        mean = [statistics.mean(run.curve[step] for run in of_type) for step in steps]
        axes.plot(steps, mean, color=colour, linewidth=2.2, marker=".", label=position_type)
    axes.set(xlabel="step", xlim=(0, None))
    save(figure, axes, path)


def draw_longer_texts(longer: dict[tuple[str, str], dict], times: list[int], path: Path) -> None:
    """A line for the mean of each type and way, dashed in one long window, and a dot for each seed."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (position_type, way), f1 in longer.items():
        if way == "one_window" and position_type == "absolute":
            continue
        colour, dashed = POSITION_TYPES[position_type], way == "one_window"
        means = [statistics.mean(f1[factor]) for factor in times]
        axes.plot(
            times,
            means,
            color=colour,
            linewidth=2.2,
            linestyle="--" if dashed else "-",
            label=f"{position_type}, {WAYS[way]}",
        )
        for factor in times:
            axes.plot(
                [factor] * len(f1[factor]),
                f1[factor],
                color=colour,
                linestyle="",
                marker="o",
                markersize=4.5,
                markerfacecolor="white" if dashed else colour,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(times, [f"x{factor}" for factor in times])
    axes.set(xlabel="length of the text, in windows of training")
    save(figure, axes, path)


def save(figure, axes, path: Path) -> None:
    axes.set(ylabel="f1 on questions that were not trained on", ylim=(0, 101))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
