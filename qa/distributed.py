"""Distributed helpers: rank-0 logging and execution, restarts, exit."""

import atexit
import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Callable

import torch.distributed as dist
import transformers

from qa.files import QAError, one_line, told_in_one_line

OUR_LOGGERS = ("run_squad", "trainer_qa", "qa")


def set_up_logging(level: int) -> None:
    """Logs this program's messages from `level` on, and the libraries' only when something is wrong."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=max(level, logging.WARNING),
        force=True,
    )
    for module in OUR_LOGGERS:
        logging.getLogger(module).setLevel(level)
    for library in ("accelerate", "datasets", "evaluate", "filelock", "fsspec", "httpx", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)  # their warnings say nothing to a user
    hub_logger = logging.getLogger("huggingface_hub")
    hub_logger.setLevel(max(level, logging.WARNING))
    hub_logger.handlers.clear()  # its own would print each line a second time
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and writing weights; the Trainer's own stay


def gather(value) -> list:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def fail_together():
    """Where the body fails on one process, every process fails: the others with QAError, which says the same.

    Every process must enter it; so none waits for one that is gone.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = [message for message in gather(failure and one_line(failure)) if message]
    if messages:
        raise failure or QAError(messages[0])


@contextlib.contextmanager
def writing(place: str):
    """Raises QAError on every process where one cannot write to `place`."""
    with fail_together(), told_in_one_line(f"cannot write {place}"):
        yield


def on_main_process(function: Callable):
    """What `function()` returns on the main process, on every process; where it fails, every process fails."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with fail_together():
        result = function() if is_main else None
    return gather(result)[0]


def meet_after_restart(backend: str, timeout: float) -> None:
    """Initializes the process group of a run that torchrun has restarted; does nothing in any other run.

    Restarted processes share the key-value store of those before them (torch 2.13), and wait for ever where one of them
    reads the address of one that is gone; a key prefix for each restart avoids that. Several agents count their
    restarts apart, and cannot agree on a prefix: they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
    """
    environment = os.environ
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shares_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts == "0" or not shares_store or environment["GROUP_WORLD_SIZE"] != "1" or dist.is_initialized():
        return
    address, port, world_size = (environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
    patience = datetime.timedelta(seconds=timeout)
    store = dist.TCPStore(address, int(port), int(world_size), is_master=False, timeout=patience)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"restart-{restarts}", store),
        rank=int(environment["RANK"]),
        world_size=int(world_size),
        timeout=patience,
    )


def was_launched() -> bool:
    """Whether torchrun, MPI or the like has started this process."""
    variables = "LOCAL_RANK WORLD_SIZE PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE".split()
    return any(name in os.environ for name in variables)


def was_restarted() -> bool:
    """Whether torchrun or SLURM has restarted this command; every process must ask, and hears the same."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return any(gather(any(count != "0" for count in counts)))


def run_and_exit(main: Callable[[], None]) -> None:
    """Runs a program and ends the process; under torchrun without the interpreter's teardown.

    In the teardown a thread of gloo's now and then aborts a process that is done, which torchrun takes for a failure.
    """
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
