"""Between the program and the hub: names that have moved, a hub that cannot be reached, and errors in one line."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from qa.files import QAError, one_line

logger = logging.getLogger(__name__)

HTTPError = HfHubHTTPError.__bases__[0]  # of httpx or of httpx2, whichever huggingface_hub is built on
# What the libraries raise where they do not get what they want. (RuntimeError is torch's too, for want of memory.)
ERRORS = {
    "model": (OSError, ValueError, SafetensorError, HTTPError),
    "dataset": (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError),
}
WAITS = (1, 4)  # seconds before the hub is asked again, where it does not answer
TIMEOUT = 10  # seconds for an answer
WRONG_TOKEN = "Invalid credentials in Authorization header"
LOG_IN = "`hf auth login`, or run_squad.py's --token"

# Where a model is there as pytorch_model.bin only, transformers would have a Space of the hub convert it, in a thread,
# and send it the user's token.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

_down: list[Exception] = []  # why, once the hub has been given up, so that a run does not wait again for each name


@contextlib.contextmanager
def loading(what: str, name: str, kind: str, revision: str | None = None, token=None, cache_dir=None) -> Iterator[str]:
    """Around the code that loads the `kind` ("model" or "dataset") `name`, a folder or a name on the hub.

    Gives the name to load it by: for a dataset, what the hub calls it by now. Where the hub cannot be reached or is out
    of order, the code runs as with HF_HUB_OFFLINE=1, on what the cache holds, and a log line says so.

    Raises ValueError of one line that begins with `what` where the code raises an error of the hub or of its libraries.
    """
    id_, problem = name, None
    asked = _is_hub_name(name) and not constants.HF_HUB_OFFLINE
    if asked:
        id_, problem = _ask(name, kind, revision, token)
    if kind == "dataset" and _is_hub_name(name) and (not asked or problem is not None):
        id_ = _remembered(name, cache_dir)
    down = problem is not None and _is_down(problem)
    if down:
        logger.warning("Looking for %s in the cache: %s.", name, _why_down(problem))
    try:
        with _offline() if down else contextlib.nullcontext():
            yield id_
    except ERRORS[kind] as error:
        raise QAError(f"{what}{_explain(error, problem, name, kind, revision, cache_dir)}") from error
    if kind == "dataset" and id_ != name and asked and problem is None:
        _remember(name, id_, cache_dir)


@contextlib.contextmanager
def download_bars() -> Iterator[None]:
    """Shows how far huggingface_hub's downloads are, on a terminal.

    For files that several processes want at once: a lock lets one of them download, and so show a bar.
    """
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # the user has decided
        yield
        return
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        huggingface_hub.utils.disable_progress_bars()


def _is_hub_name(name: str) -> bool:
    if os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@functools.cache
def _ask(name: str, kind: str, revision: str | None, token) -> tuple[str, Exception | None]:
    """(the name that the hub gives it, None), or (name, why the hub does not give it)."""
    api = huggingface_hub.HfApi()
    facts = api.dataset_info if kind == "dataset" else api.model_info
    if _down and not isinstance(_down[0], HfHubHTTPError):
        return name, _down[0]
    for wait in (*(() if _down else WAITS), None):
        try:
            info = facts(name, revision=revision, timeout=TIMEOUT, token=token)
            if info.gated:  # everybody may read the facts, not the files
                api.auth_check(info.id, repo_type=kind, token=token)
            return info.id, None
        except HTTPError as error:
            if not _is_down(error):
                return name, error
            if wait is None:
                _down.append(error)
                return name, error
            logger.warning("Asking again in %d s: %s.", wait, _why_down(error))
            time.sleep(wait)
        except (ValueError, KeyError, TypeError):  # no answer of a hub, but of something before it that wants a log-in
            return name, None


def _is_down(error: Exception) -> bool:
    """Whether the hub was not reached or is out of order, so that another try may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError)


def _why_down(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub at {constants.ENDPOINT} answers {error.response.status_code} {error.response.reason_phrase}"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({one_line(error)})"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    kept = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept


# ---- Datasets that have moved ----

# The hub redirects names such as squad, but load_dataset puts them into hf:// addresses, which have no room for a
# redirect, and files its cache under the name that it is given. So the name is looked up first, and what was found is
# kept beside the cache for when there is no network. To look for the one cached folder that ends in ___squad instead
# would be a guess: it may be somebody's own variant.


def _remember(name: str, id_: str, cache_dir) -> None:
    file = _names_folder(cache_dir) / name.replace("/", "___")
    with contextlib.suppress(OSError):  # a cache that may not be written to
        if not file.exists() or file.read_text(encoding="utf-8") != id_:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{file.name}.{os.getpid()}.writing")
            beside.write_text(id_, encoding="utf-8")
            os.replace(beside, file)


def _remembered(name: str, cache_dir) -> str:
    """What the hub has called the dataset before, where the cache still holds that."""
    try:
        id_ = (_names_folder(cache_dir) / name.replace("/", "___")).read_text(encoding="utf-8")
    except OSError:
        return name
    namespace, _, short_name = id_.rpartition("/")
    held = Path(_datasets_cache(cache_dir), f"{namespace}___{camelcase_to_snakecase(short_name)}").is_dir()
    return id_ if held else name


def _names_folder(cache_dir) -> Path:
    return Path(_datasets_cache(cache_dir), "hub_names")


def _datasets_cache(cache_dir) -> str:
    return os.path.expanduser(str(cache_dir or datasets.config.HF_DATASETS_CACHE))


def _cached_variants(name: str, cache_dir) -> list[str]:
    folders = Path(_datasets_cache(cache_dir)).glob(f"*___{camelcase_to_snakecase(name)}")
    return sorted(folder.name.replace("___", "/", 1) for folder in folders if folder.is_dir())


# ---- Errors ----


def _explain(error: Exception, problem: Exception | None, name: str, kind: str, revision, cache_dir) -> str:
    """What has happened and what to do. `problem` is what the hub said when it was asked about the name."""
    chain = list(_chain(error))
    # load_dataset drops the causes of its errors.
    dropped = kind == "dataset" and isinstance(error, (OSError, datasets.exceptions.DatasetsError))
    if not dropped and not any(
        isinstance(link, (HTTPError, LocalEntryNotFoundError, ConnectionError)) for link in chain
    ):
        return f": {one_line(error)}"
    if problem is None and constants.HF_HUB_OFFLINE:
        variants = _cached_variants(name, cache_dir) if kind == "dataset" and "/" not in name else []
        held = f"There is {' and '.join(variants)}: give that name. Or" if variants else "Unset it, or"
        return (
            f" ({one_line(error)}): HF_HUB_OFFLINE is set, and the cache ({_cache(kind, cache_dir)}) does not hold all "
            f"of it. {held} give the command once where there is a network"
        )
    later = next(
        (link for link in chain if isinstance(link, HTTPError) and not isinstance(link, EntryNotFoundError)), None
    )
    broke_off = problem is None and later is not None and not isinstance(later, HfHubHTTPError)
    if broke_off or "Consistency check failed" in str(error):
        return f": the download broke off ({one_line(later or error)}): give the same command again"

    problem = problem or later
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if isinstance(problem, GatedRepoError):
        return (
            f": the hub gives its files only to those who have accepted its terms: accept them at {page}, and say who "
            f"you are ({LOG_IN})"
        )
    if isinstance(problem, HfHubHTTPError) and problem.response.headers.get("X-Error-Message") == WRONG_TOKEN:
        return f": the hub does not know the token: say who you are ({LOG_IN})"
    # 401 is what those who have not said who they are get for all that is private or not there.
    not_there = isinstance(problem, HfHubHTTPError) and problem.response.status_code == 401
    if not_there or isinstance(problem, RepositoryNotFoundError):
        return (
            f": there is no such folder, and on the hub no {kind} of that name, or it is private: check the name; if "
            f"it is private, say who you are ({LOG_IN})"
        )
    if isinstance(problem, RevisionNotFoundError):
        return f": on the hub it has no revision {revision}: {page}/tree/main shows those that it has"
    if problem is not None and _is_down(problem):
        todo = (
            "try again later"
            if isinstance(problem, HfHubHTTPError)
            else "check the network, or copy a filled cache here"
        )
        return f": {_why_down(problem)}, and the cache ({_cache(kind, cache_dir)}) does not hold all of it: {todo}"
    missing = next((link for link in chain if isinstance(link, LocalEntryNotFoundError)), None)
    return f": {one_line(problem or missing or error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _cache(kind: str, cache_dir) -> str:
    return _datasets_cache(cache_dir) if kind == "dataset" else str(cache_dir or constants.HF_HUB_CACHE)
