"""Several processes as one: who speaks, what the main one does for all, restarts, and the way out."""

import atexit
import datetime
import logging
import os
import sys
from collections.abc import Callable

import torch.distributed as dist
import transformers

from qa.files import QAError, one_line

OUR_LOGGERS = ("run_squad", "trainer_qa", "qa")


def set_up_logging(level: int) -> None:
    """This program speaks from `level` on; the libraries only when something is wrong, whichever there are."""
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


def on_main_process(function: Callable):
    """What `function()` returns on the main process, on every process; where it fails there, every process fails.

    Raises the ValueError of `function`, and `QAError` for an OSError, such as a full disk.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        shared = [None, None, False]
        dist.broadcast_object_list(shared, src=0)
        result, message, is_value_error = shared
        if message is not None:
            raise QAError(message) if is_value_error else QAError(message)
        return result
    result = failure = None
    try:
        result = function()
    except Exception as error:
        failure = QAError(f"cannot write: {one_line(error)}") if isinstance(error, OSError) else error
    if dist.is_initialized():
        message = None if failure is None else str(failure)
        dist.broadcast_object_list([result, message, isinstance(failure, ValueError)], src=0)
    if failure is not None:
        raise failure
    return result


def meet_after_restart(backend: str, timeout: float) -> None:
    """Brings together the processes of a run that torchrun has started again; does nothing in any other run.

    torchrun's restarted processes meet in the store of those before them (torch 2.13), and wait for ever where one of
    them reads the address of one that is gone. Under a name of its own a restart finds only itself. Several agents
    count their restarts apart, and so cannot agree on a name: they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
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


def was_restarted() -> bool:
    """Has a launcher given this command again, after its processes died? Every process must ask, and hears the same."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return any(gather(any(count != "0" for count in counts)))


def leave(status: int | None) -> None:
    """Ends the process; under torchrun without the interpreter's teardown.

    There a thread of gloo's now and then aborts a process that has done its work, which torchrun takes for a failure.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
