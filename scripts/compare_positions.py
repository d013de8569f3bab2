"""The table and the picture of compare_positions.sh.

    python scripts/compare_positions.py OUTPUT_DIR SEED ...

reads OUTPUT_DIR/seed-SEED/{absolute,relative_key,relative_key_query}, prints the table and writes f1_over_steps.png.
"""

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


class Run(NamedTuple):
    exact: float
    f1: float
    steps: int
    curve: dict[int, float]  # f1 by step


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit("usage: compare_positions.py OUTPUT_DIR SEED ...")
    output_dir = Path(argv[0])
    try:
        runs = read_runs(output_dir, argv[1:])
    except ValueError as error:
        print(f"compare_positions.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(runs))
    draw(runs, output_dir / "f1_over_steps.png")
    print(f"\nf1 over steps: {output_dir / 'f1_over_steps.png'}")


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
    axes.set(xlabel="step", ylabel="f1 on questions that were not trained on", ylim=(0, 101), xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
