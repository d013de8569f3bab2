"""Between the program and the hub: names that have moved, a hub that does not answer, and errors in one line."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub import constants, errors
from safetensors import SafetensorError

from qa.files import QAError, one_line

logger = logging.getLogger(__name__)

HTTPError = errors.HfHubHTTPError.__bases__[0]  # of httpx or of httpx2, whichever huggingface_hub is built on
# What the libraries raise where they do not get what they want. (RuntimeError is torch's too, for want of memory.)
ERRORS = {
    "model": (OSError, ValueError, SafetensorError, HTTPError),
    "dataset": (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError),
}
MOVED = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}  # for where there is no hub to say so
TIMEOUT = 10  # seconds for the hub's answer
WAIT = 5  # seconds before it is asked again, once
LOG_IN = "`hf auth login`, or run_squad.py's --token"

# Where a model is there as pytorch_model.bin only, transformers would have a Space of the hub convert it, in a thread,
# and send it the user's token.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


@contextlib.contextmanager
def loading(what: str, name: str, kind: str, revision: str | None = None, token=None, cache_dir=None) -> Iterator[str]:
    """Around the code that loads the `kind` ("model" or "dataset") `name`, a folder or a name on the hub.

    Gives its present name: the hub redirects an old one such as squad, but load_dataset makes hf:// addresses of it,
    which are refused, and has its cache by name. Where the hub cannot be reached or is out of order, a log line says so
    and the code gets what the cache holds; by themselves the libraries get there after more than a minute of retries.

    Raises QAError that begins with `what` where the code raises an error of the hub or of its libraries.
    """
    id_, problem = (name, None) if os.path.exists(name) else _ask(name, kind, revision, token)
    id_ = id_ or _cached_name(name, kind, cache_dir)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # otherwise the user has decided
        huggingface_hub.utils.enable_progress_bars()  # on a terminal
    try:
        with _no_requests() if _is_down(problem) else contextlib.nullcontext():
            yield id_
    except ERRORS[kind] as error:
        raise QAError(f"{what}: {_explain(error, problem, name, kind, revision, cache_dir)}") from error


@functools.cache
def _ask(name: str, kind: str, revision: str | None, token) -> tuple[str | None, Exception | None]:
    """(the present name, None), or (None, why the hub does not give it)."""
    api = huggingface_hub.HfApi(token=token)
    for wait in (WAIT, 0):
        try:
            info = api.repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
            if info.gated:  # everybody may read the facts, not the files
                api.auth_check(info.id, repo_type=kind)
            return info.id, None
        except (HTTPError, errors.OfflineModeIsEnabled) as error:
            problem = error
        except (ValueError, KeyError, TypeError):  # not a name, or what answers is a network that wants a log-in
            return None, None
        if not _is_down(problem):
            return None, problem
        then = f"asking again in {wait} s" if wait else "looking in the cache"
        logger.warning("%s: %s: %s.", name, _why_down(problem), then)
        time.sleep(wait)
    return None, problem


def _is_down(problem: Exception | None) -> bool:
    """Whether the hub was not reached or is out of order."""
    if isinstance(problem, errors.HfHubHTTPError):
        return problem.response.status_code in (408, 429) or problem.response.status_code >= 500
    return isinstance(problem, HTTPError)


def _why_down(problem: Exception) -> str:
    first_line = str(problem).partition("\n")[0] or type(problem).__name__
    return f"the hub at {constants.ENDPOINT} does not answer ({first_line})"


@contextlib.contextmanager
def _no_requests() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which the libraries read when they are imported."""

    def refuse(request) -> None:
        raise errors.OfflineModeIsEnabled("it did not answer before")

    hooks = huggingface_hub.get_session().event_hooks["request"]
    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


def _cached_name(name: str, kind: str, cache_dir) -> str:
    """The present name where the cache holds that; older versions of datasets filled it under the old one."""
    present = MOVED.get(name, name)
    return present if Path(_cache(kind, cache_dir), present.replace("/", "___")).is_dir() else name


def _cache(kind: str, cache_dir) -> str:
    default = datasets.config.HF_DATASETS_CACHE if kind == "dataset" else constants.HF_HUB_CACHE
    return os.path.expanduser(str(cache_dir or default))


def _explain(error: Exception, problem: Exception | None, name: str, kind: str, revision, cache_dir) -> str:
    """What has happened and what to do. `problem` is what the hub said when it was asked about the name."""
    chain = [error]
    while (origin := chain[-1].__cause__ or chain[-1].__context__) is not None and origin not in chain:
        chain.append(origin)
    # load_dataset drops the causes of its errors, which then are a FileNotFoundError or a ConnectionError.
    if not any(isinstance(link, (HTTPError, FileNotFoundError, ConnectionError)) for link in chain):
        return one_line(error)
    later = next((link for link in chain if isinstance(link, HTTPError)), None)
    if problem is None and later is not None and not isinstance(later, errors.HfHubHTTPError):
        return f"the download broke off ({one_line(later)}): give the same command again"

    problem = problem or later
    offline = isinstance(problem, errors.OfflineModeIsEnabled)
    if offline or _is_down(problem):
        why = "HF_HUB_OFFLINE is set" if offline else _why_down(problem)
        held = Path(_cache(kind, cache_dir)).glob(f"*___{name}")
        names = " and ".join(sorted(folder.name.replace("___", "/") for folder in held))
        todo = f"it holds {names}: give that name" if names else "give the same command once where the hub answers"
        return f"{why}, and the cache ({_cache(kind, cache_dir)}) does not hold all of it: {todo}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if isinstance(problem, errors.GatedRepoError):
        todo = f"accept them at {page}, and say who you are ({LOG_IN})"
        return f"the hub gives its files only to those who have accepted its terms: {todo}"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"on the hub it has no revision {revision}: {page}/tree/main shows those that it has"
    if isinstance(problem, errors.HfHubHTTPError) and "Invalid credentials" in str(problem):
        return f"the hub does not know the token: say who you are ({LOG_IN})"
    # 401 is what those who have not said who they are get for all that is private or not there.
    unknown = isinstance(problem, errors.HfHubHTTPError) and problem.response.status_code == 401
    if unknown or isinstance(problem, errors.RepositoryNotFoundError):
        todo = f"check the name; if it is private, say who you are ({LOG_IN})"
        return f"there is no such folder, and on the hub no {kind} of that name, or it is private: {todo}"
    return one_line(error)
