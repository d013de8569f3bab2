"""However many processes a run has, and whoever starts them, it gives the same answers and the same training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
from launch import At, finish
from tiny import read, tiny_bert, tiny_questions, weights

from qa.checkpoints import complete_checkpoints

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
NEAR_TIE = 1e-4  # float32 sums differ by batch shape, so that answers this close may change places
WINDOWS = "--max_seq_length 20 --doc_stride 5".split()
TRAIN = [*WINDOWS, *"--do_train --num_train_epochs 2 --learning_rate 1e-2 --save_steps 3".split()]
BATCHES_OF_4 = ["--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_bert(folder / "model")
    config = read(model, "config.json") | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    Path(model, "config.json").write_text(json.dumps(config))
    return {
        "model": model,
        "train": tiny_questions(folder / "train.json", paragraphs=8),
        "dev": tiny_questions(folder / "dev.json", paragraphs=19),
    }


@pytest.fixture(scope="module")
def command(inputs):
    return [*TRAIN, "--model_name_or_path", inputs["model"], "--train_file", inputs["train"]]


@pytest.fixture(scope="module")
def two_processes(command, tmp_path_factory):
    """What two processes come to that no launcher has started."""
    out = tmp_path_factory.mktemp("two_processes") / "out"
    finish([*command, *BATCHES_OF_4], out, 2)
    return out


# ---- Evaluation ----


@pytest.fixture(scope="module")
def evaluated(two_processes, inputs, tmp_path_factory):
    """Answers, n-best lists and metrics by number of processes and batch size."""
    results = {}

    def evaluate(processes, batch):
        if (processes, batch) not in results:
            out = tmp_path_factory.mktemp("evaluated")
            flags = ["--do_eval", *WINDOWS, "--per_device_eval_batch_size", batch]
            finish([*flags, "--model_name_or_path", two_processes, "--validation_file", inputs["dev"]], out, processes)
            files = ("eval_predictions.json", "eval_nbest_predictions.json", "eval_results.json")
            results[processes, batch] = [read(out, name) for name in files]
        return results[processes, batch]

    return evaluate


@pytest.mark.parametrize(
    "processes, batch",
    [(1, 5), (2, 7), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 1), (3, 4), (8, 1), (8, 50)])],
)
def test_evaluation_is_the_same(processes, batch, evaluated):
    """38 questions in 114 windows, which none of these divides; 8 x 50 are more than there are."""
    answers, n_best, metrics = evaluated(1, 8)
    other_answers, other_n_best, other_metrics = evaluated(processes, batch)
    assert list(other_answers) == list(answers) and len(answers) == 38
    assert other_metrics["eval_total"] == 38 and other_metrics["eval_samples"] == metrics["eval_samples"] == 114
    near_ties = 0
    for question_id, answer in answers.items():
        if other_answers[question_id] != answer:
            first, second = (best["start_logit"] + best["end_logit"] for best in n_best[question_id][:2])
            assert first - second < NEAR_TIE, question_id
            near_ties += 1
    assert other_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    if near_ties == 0:
        for name in ("eval_exact", "eval_f1"):
            assert other_metrics[name] == metrics[name]
    for question_id, best in n_best.items():
        logits = [[entry[key] for entry in best[:5]] for key in ("start_logit", "end_logit")]
        others = [[entry[key] for entry in other_n_best[question_id][:5]] for key in ("start_logit", "end_logit")]
        np.testing.assert_allclose(np.sum(others, axis=0), np.sum(logits, axis=0), atol=NEAR_TIE)


# ---- Training ----


def test_loss_curve_is_the_same(command, tmp_path):
    """48 windows make 6 steps an epoch of 8 windows, without dropout and in random order.

    All are padded to the same length: padding takes part in the softmax of BERT's loss, and so would its length.
    """
    curves = {}
    for processes, batch, accumulation in ((1, 8, 1), (2, 4, 1), (2, 2, 2)):
        out = tmp_path / f"{processes}-{batch}-{accumulation}"
        flags = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        flags += ["--train_sampling_strategy", "random", "--pad_to_max_length", "--logging_steps", "1"]
        finish([*command, *flags], out, processes)
        history = read(out, "trainer_state.json")["log_history"]
        curves[out.name] = [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert len(curves["1-8-1"]) == 12
    for curve in curves.values():
        np.testing.assert_allclose(curve, curves["1-8-1"], rtol=2e-4)


# ---- Launchers ----


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(launch.ROOT), str(launch.ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_worker(command, two_processes, tmp_path):
    """With --overwrite_output_dir, which a restarted run must not obey."""
    lost = At("trainer_qa.QuestionAnsweringTrainer.training_step", 10, rank=1)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, runpy, launch\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        f"    launch.signal_at(launch.At({lost.function!r}, {lost.call}))\n"
        f"runpy.run_path({str(launch.ROOT / 'run_squad.py')!r}, run_name='__main__')\n"
    )
    out = tmp_path / "out"
    flags = [*command, *BATCHES_OF_4, "--overwrite_output_dir", "--output_dir", out]
    argv = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=1", worker, *flags]
    done = subprocess.run([*map(str, argv)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Going on from {out}/checkpoint-9." in done.stderr
    assert weights(out) == weights(two_processes)


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_of_torchrun_and_the_workers_again_by_the_agent(command, tmp_path):
    out = tmp_path / "out"
    flags = [*command, *BATCHES_OF_4, "--output_dir", out, "--num_train_epochs", "10000"]
    agent = subprocess.Popen(
        [*TORCHRUN, "--standalone", "--nproc_per_node=2", launch.ROOT / "run_squad.py", *map(str, flags)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_a_checkpoint(out)
    os.killpg(agent.pid, signal.SIGINT)
    _, err = agent.communicate(timeout=60)
    assert agent.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("run_squad.py: ")]
    assert line == (
        f"run_squad.py: stopped by SIGINT; the run so far stands in {complete_checkpoints(out)[-1]}. "
        "Give the same command again to go on."
    )


def wait_for_a_checkpoint(out, after=None) -> None:
    deadline = time.monotonic() + 120
    while complete_checkpoints(out)[-1:] in ([], [after]) and time.monotonic() < deadline:
        time.sleep(0.1)


# srun starts a copy on each node, on one core unless it is told otherwise, and hands signals on; here both nodes are
# this machine.
SRUN = """#!/usr/bin/env bash
cores=1
while [[ $1 == --* ]]; do [[ $1 == --cpus-per-task=* ]] && cores=${1#*=}; shift; done
taskset --cpu-list 0-$((cores - 1)) "$@" & first=$!
taskset --cpu-list 0-$((cores - 1)) "$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; status=$?; wait $second
wait $first; wait $second
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$REQUEUED"; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """The environment of a SLURM job on two nodes with one process each, that meet on the loopback interface."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **environment(),
        "PATH": os.pathsep.join(path),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": str(os.cpu_count()),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_SUBMIT_DIR": str(launch.ROOT),
        "REQUEUED": str(tmp_path / "requeued"),
    }


def job(cluster, *flags) -> subprocess.Popen:
    argv = ["bash", launch.ROOT / "scripts/slurm.sbatch", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, argv)], env=cluster, **pipes)


def test_a_job_has_all_its_cores(cluster, tmp_path):
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text("#!/usr/bin/env bash\nenv --unset=OMP_NUM_THREADS nproc\n")
    torchrun.chmod(0o755)
    assert job(cluster).communicate(timeout=60)[0].split() == [str(len(os.sched_getaffinity(0)))] * 2


@pytest.mark.slow
def test_two_nodes_of_a_cluster(command, inputs, two_processes, cluster, tmp_path):
    flags = [*command, *BATCHES_OF_4, "--output_dir", tmp_path / "out"]
    running = job(cluster, *flags, "--do_eval", "--validation_file", inputs["dev"])
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err[-3000:]
    assert out.count('"f1"') == 1
    assert weights(tmp_path / "out") == weights(two_processes)
    assert read(tmp_path / "out", "eval_results.json")["eval_total"] == 38
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_job_told_to_stop_queues_itself_again(command, cluster, tmp_path):
    flags = [*command, *BATCHES_OF_4, "--output_dir", tmp_path / "out"]
    flags += ["--overwrite_output_dir", "--num_train_epochs", "10000"]
    for attempt in range(2):
        newest = next(reversed(complete_checkpoints(tmp_path / "out")), None)
        running = job({**cluster, "SLURM_RESTART_COUNT": str(attempt)}, *flags)
        wait_for_a_checkpoint(tmp_path / "out", newest)
        running.terminate()
        _, err = running.communicate(timeout=60)
        assert running.returncode != 0
        assert (tmp_path / "requeued").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
        (tmp_path / "requeued").unlink()
        assert "stopped by SIGTERM" in err
        assert (f"Going on from {newest}." in err) == (attempt == 1)
