"""A hub on the loopback interface that huggingface_hub, transformers and datasets talk to through HF_ENDPOINT.

It answers as the hub does, with its statuses, headers, redirects, pages and errors, and holds small repositories that
are laid out as the published ones. Large files come from a second server, as they do from the hub's CDN.
"""

import hashlib
import io
import json
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import torch
from datasets import Dataset
from hub_cache import as_strings
from safetensors.torch import save as safetensors_bytes
from tiny import PEOPLE, TOWNS, WORDS, tiny_questions
from transformers import BertTokenizerFast

from qa.read_squad import read_squad_file

ENTRIES_A_PAGE = 3  # the hub's pages hold 1000; here more than one is needed all the same
LARGE = (".bin", ".h5", ".msgpack", ".parquet", ".safetensors")  # kept outside of git
LEGACY_NAMES = {
    ("models", "bert-base-uncased"): "google-bert/bert-base-uncased",
    ("models", "bert-large-uncased-whole-word-masking"): "google-bert/bert-large-uncased-whole-word-masking",
    ("datasets", "squad"): "rajpurkar/squad",
    ("datasets", "squad_v2"): "rajpurkar/squad_v2",
}


# ---- Server ----


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False  # only those whose token stands in `admitted` get files
    admitted: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        return hashlib.sha1(
            repr(sorted((name, _sha256(data)) for name, data in self.files.items())).encode()
        ).hexdigest()

    def entry(self, path: str) -> dict:
        data = self.files[path]
        entry = {"type": "file", "oid": _git_oid(data), "size": len(data), "path": path}
        if path.endswith(LARGE):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(data)}\nsize {len(data)}\n"
            entry["oid"] = _git_oid(pointer.encode())
            entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": len(pointer)}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict] | None:
        """The entries under `folder` ("" is the root); None where there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in self.files if path.startswith(prefix))
        if not below:
            return None
        entries = {}
        for path in below:
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "oid": _git_oid(name.encode()), "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path)
        return list(entries.values())


class Hub:
    """Repositories by ("models" or "datasets", id), and the faults that are switched on.

    `status`: every request is answered with it. `break_off`: after how many bytes the download of a file with
    this content breaks off, each time. `deaf`: requests are taken and never answered.

    `requests`: (method, path with query, status) of all that was asked.
    """

    def __init__(self, repositories: dict[tuple[str, str], Repository]):
        self.repositories = repositories
        self.tokens: set[str] = set()
        self.status: int | None = None
        self.break_off: dict[bytes, int] = {}
        self.deaf = False
        self.requests: list[tuple[str, str, int]] = []
        self._servers: list[ThreadingHTTPServer] = []
        self._ports = (0, 0)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self._ports[1]}"  # another host than the hub's, as clients see it

    def start(self) -> None:
        handlers = (type("Handler", (base,), {"hub": self}) for base in (_HubHandler, _CdnHandler))
        self._servers = [_Server(("127.0.0.1", port), h) for port, h in zip(self._ports, handlers, strict=True)]
        self._ports = tuple(server.server_address[1] for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused; `start` opens the same ports again."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @contextmanager
    def fault(self, **faults) -> Iterator[None]:
        for name, value in faults.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            self.status, self.break_off, self.deaf = None, {}, False

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """The variables of a process that has nothing but this hub, and `home` for what it gets from there."""
        inherited = {k: v for k, v in os.environ.items() if not re.match(r"(HF|HUGGINGFACE|TRANSFORMERS)_", k)}
        return {**inherited, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **variables}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address):
        pass  # a client that has gone is no news


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.hub.deaf:
            threading.Event().wait(600)
        elif self.hub.status is not None:
            self.send(self.hub.status, b"Internal Error - We're working hard to fix this as soon as possible!")
        else:
            self.answer()

    def send(self, status: int, content: bytes = b"", content_type: str = "text/plain; charset=utf-8", **headers):
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Request-Id", f"Root=1-{len(self.hub.requests):08x}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, name: str, data: bytes, **headers):
        status, start, stop = 200, 0, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
            if start >= len(data):
                return self.send(416, Content_Range=f"bytes */{len(data)}")
            status = 206
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        headers |= {"Accept_Ranges": "bytes", "Content_Disposition": f'inline; filename="{name}";'}
        kept = self.hub.break_off.get(data)
        if kept is None or self.command == "HEAD":
            return self.send(status, data[start:stop], "application/octet-stream", **headers)
        # The headers promise all, the connection ends early.
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[start : max(start, min(stop, kept))])
        self.wfile.flush()
        self.close_connection = True


class _CdnHandler(_Handler):
    def answer(self):
        if self.headers.get("Authorization"):  # as storage does with signed addresses
            return self.send(400, b"<Error><Code>InvalidArgument</Code></Error>", "application/xml")
        digest = urlsplit(self.path).path.removeprefix("/")
        for repository in self.hub.repositories.values():
            for path, data in repository.files.items():
                if _sha256(data) == digest:
                    return self.send_file(path.split("/")[-1], data, ETag=f'"{_git_oid(data)}"')
        self.send(403, b"<Error><Code>AccessDenied</Code></Error>", "application/xml")


class _HubHandler(_Handler):
    def answer(self):
        path, _, query = self.path.partition("?")
        path = unquote(path)
        api = re.match(r"/api/(models|datasets)/(?P<rest>.+)", path)
        cached = re.match(r"/api/resolve-cache/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
        resolve = re.fullmatch(r"/(datasets/)?(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<rest>.+)", path)
        if cached:
            kind, id_, _, file = cached.groups()
            repository = self.repository(kind, id_, files=True)
            if repository:
                data = repository.files[file]
                self.send_file(file.split("/")[-1], data, ETag=f'"{_git_oid(data)}"', X_Repo_Commit=repository.commit)
        elif api:
            self.answer_api(api[1], api["rest"], parse_qs(query))
        elif resolve:
            kind = "datasets" if resolve[1] else "models"
            if not self.redirected(kind, resolve["id"]):
                self.answer_resolve(kind, resolve["id"], resolve["rest"])
        else:
            self.refuse(404, "Sorry, we can't find the page you are looking for.")

    def answer_api(self, kind: str, rest: str, query: dict):
        # One word is a legacy name, unless it is all there is before a verb.
        verbs = "revision|tree|paths-info|auth-check|commits|refs|discussions"
        id_, _, verb, rest = re.fullmatch(rf"([^/]+(?:/(?!(?:{verbs})\b)[^/]+)?)(/({verbs})(?:/(.*))?)?", rest).groups()
        if self.redirected(kind, id_):
            return None
        repository = self.repository(kind, id_, files=verb in ("tree", "paths-info", "auth-check"))
        if repository is None:
            return None
        if verb in (None, "revision"):
            if self.is_revision(repository, rest or "main"):
                return self.send_json(self.facts(kind, id_, repository))
        elif verb == "auth-check":
            return self.send(200, b"OK")
        elif verb == "paths-info":
            if self.is_revision(repository, rest):
                paths = parse_qs(self.body.decode()).get("paths", [])
                entries = {entry["path"]: entry for entry in repository.tree("", recursive=True)}
                return self.send_json([entries[path] for path in paths if path in entries])
        elif verb == "tree":
            revision, _, folder = rest.partition("/")
            if self.is_revision(repository, revision):
                return self.send_tree(repository, revision, folder, query)
        else:  # a reader has no business there
            return self.refuse(403, "Discussions are disabled for this repo", "DiscussionsDisabled")
        return None

    def send_tree(self, repository: Repository, revision: str, folder: str, query: dict):
        entries = repository.tree(folder, recursive=query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if entries is None:
            return self.refuse(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        last = first + min(ENTRIES_A_PAGE, int(query.get("limit", ["1000"])[0]))
        headers = {}
        if last < len(entries):
            own_query = "&".join(f"{k}={quote(v[0])}" for k, v in query.items() if k != "cursor")
            path = self.path.partition("?")[0]
            headers["Link"] = f'<{self.hub.url}{path}?{own_query}&cursor={last}>; rel="next"'
        return self.send_json(entries[first:last], **headers)

    def answer_resolve(self, kind: str, id_: str, rest: str):
        repository = self.repository(kind, id_, files=True)
        if repository is None:
            return None
        revision = "refs/pr/" + rest.split("/")[2] if rest.startswith("refs/pr/") else rest.split("/")[0]
        file = rest.removeprefix(f"{revision}/")
        if not self.is_revision(repository, revision):
            return None
        if file not in repository.files:
            return self.refuse(404, "Entry not found", "EntryNotFound", X_Repo_Commit=repository.commit)
        data = repository.files[file]
        headers = {"X_Repo_Commit": repository.commit, "X_Linked_Size": str(len(data)), "Accept_Ranges": "bytes"}
        if file.endswith(LARGE):
            headers |= {"X_Linked_ETag": f'"{_sha256(data)}"', "Location": f"{self.hub.cdn_url}/{_sha256(data)}"}
            return self.send(302, b"Found. Redirecting to storage", **headers)
        location = f"/api/resolve-cache/{kind}/{id_}/{repository.commit}/{quote(file)}"
        headers |= {"X_Linked_ETag": f'"{_git_oid(data)}"', "Location": location}
        return self.send(307, f"Temporary Redirect. Redirecting to {location}".encode(), **headers)

    def redirected(self, kind: str, id_: str) -> bool:
        new = LEGACY_NAMES.get((kind, id_))
        if new is None or (kind, new) not in self.hub.repositories:
            return False
        # Only the name changes; the address stays relative, and its escapes as they are.
        location = self.path.replace(f"/{id_}", f"/{new}", 1)
        self.send(307, f"Temporary Redirect. Redirecting to {location}".encode(), Location=location)
        return True

    def repository(self, kind: str, id_: str, files: bool) -> Repository | None:
        """The repository; None where an answer is sent because it is not there, or its `files` not for everyone."""
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme and token not in self.hub.tokens:
            return self.refuse(401, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get((kind, id_))
        if repository is None and scheme:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        if repository is None:
            challenge = 'Bearer realm="Authentication required", charset="UTF-8"'
            return self.refuse(401, "Invalid username or password.", WWW_Authenticate=challenge)
        if files and repository.gated and token not in repository.admitted:
            what = f"Access to {kind.removesuffix('s')} {id_} is restricted"
            if not scheme:
                text = f"{what}. You must have access to it and be authenticated to access it. Please log in."
                return self.refuse(401, text, "GatedRepo")
            page = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id_}"
            return self.refuse(403, f"{what} and you are not in the authorized list. Visit {page}", "GatedRepo")
        return repository

    def is_revision(self, repository: Repository, revision: str) -> bool:
        if revision in ("main", repository.commit):
            return True
        self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return False

    def facts(self, kind: str, id_: str, repository: Repository) -> dict:
        facts = {
            "_id": _sha256(id_.encode())[:24],
            "id": id_,
            "author": id_.split("/")[0],
            "sha": repository.commit,
            "private": False,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 7,
            "likes": 1,
            "tags": [],
            "createdAt": "2022-03-02T23:29:04.000Z",
            "lastModified": "2024-02-19T11:06:12.000Z",
            "siblings": [{"rfilename": path} for path in sorted(repository.files)],
        }
        return facts | ({"modelId": id_, "library_name": "transformers"} if kind == "models" else {})

    def refuse(self, status: int, message: str, code: str | None = None, **headers) -> None:
        if code is not None:
            headers["X_Error_Code"] = code
        headers["X_Error_Message"] = message
        if self.path.startswith("/api/"):
            self.send_json({"error": message}, status, **headers)
        else:
            self.send(status, message.encode(), **headers)

    def send_json(self, value, status: int = 200, **headers):
        self.send(status, json.dumps(value).encode(), "application/json; charset=utf-8", **headers)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# ---- Repositories ----

RELATIVE_KEY = "zhiheng-huang/bert-base-uncased-embedding-relative-key"
RELATIVE_BASE = "zhiheng-huang/bert-base-uncased-embedding-relative-key-query"
RELATIVE_LARGE = "zhiheng-huang/bert-large-uncased-whole-word-masking-embedding-relative-key-query"
GOOGLE_BASE = "google-bert/bert-base-uncased"
GOOGLE_LARGE = "google-bert/bert-large-uncased-whole-word-masking"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOWNS, *PEOPLE, *WORDS]
HIDDEN, HEADS, INTERMEDIATE, POSITIONS = 16, 2, 32, 512


def published(folder: Path, train: int = 24, validation: int = 6) -> dict[tuple[str, str], Repository]:
    """The repositories that the published commands and the README name; the squads hold so many questions."""
    repositories = {
        ("models", RELATIVE_KEY): relative_bert("relative_key", legacy_file=True),
        ("models", RELATIVE_BASE): relative_bert("relative_key_query", legacy_file=True),
        ("models", RELATIVE_LARGE): relative_bert("relative_key_query", legacy_file=False),
        ("models", GOOGLE_BASE): google_bert(with_tokenizer_json=True),
        ("models", GOOGLE_LARGE): google_bert(with_tokenizer_json=False),
    }
    for id_, config, version_2 in [("squad", "plain_text", False), ("squad_v2", "squad_v2", True)]:
        repositories["datasets", f"rajpurkar/{id_}"] = squad(folder, config, version_2, train, validation)
    return repositories


def relative_bert(position_embedding_type: str, legacy_file: bool) -> Repository:
    """As Huang et al. have put theirs on the hub in 2020: a configuration, vocab.txt, and torch's file."""
    config = bert_config(position_embedding_type) | {
        "architectures": ["BertForMaskedLM"],
        "gradient_checkpointing": False,
    }
    config |= {"transformers_version": "4.0.0-rc-1", "directionality": "bidi", "use_cache": True}
    weights = bert_weights(position_embedding_type)
    head = HIDDEN // HEADS
    weights["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = _random(2 * POSITIONS - 1, head)
    weights["bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]  # tied, and shared
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    return Repository(
        {
            ".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n",
            "README.md": b"## BERT with relative positions\n",
            "config.json": _json(config),
            "pytorch_model.bin": torch_file(weights, legacy_file),
            "vocab.txt": _vocab(),
        }
    )


def google_bert(with_tokenizer_json: bool) -> Repository:
    """As Google's: safetensors under TensorFlow's names of LayerNorm, and files of other libraries beside it."""
    config = bert_config("absolute") | {"architectures": ["BertForMaskedLM"], "gradient_checkpointing": False}
    config |= {"transformers_version": "4.6.0.dev0", "use_cache": True}
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in bert_weights("absolute").items()
    }
    weights |= {"cls.seq_relationship.weight": _random(2, HIDDEN), "cls.seq_relationship.bias": _random(2)}
    files = {
        ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": b"---\nlanguage: en\nlicense: apache-2.0\ntags:\n- exbert\n---\n\n# BERT\n",
        "config.json": _json(config),
        "flax_model.msgpack": b"not for us" * 20,
        "model.safetensors": safetensors_bytes(weights, metadata={"format": "pt"}),
        "tf_model.h5": b"not for us" * 30,
        "vocab.txt": _vocab(),
        "tokenizer_config.json": b'{"do_lower_case": true, "model_max_length": 512}',
    }
    if with_tokenizer_json:
        backend = BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}).backend_tokenizer
        files["tokenizer.json"] = backend.to_str().encode()
    return Repository(files)


def bert_config(position_embedding_type: str) -> dict:
    return {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS,
        "model_type": "bert",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "position_embedding_type": position_embedding_type,
        "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY),
    }


def bert_weights(seed: str) -> dict[str, torch.Tensor]:
    """A BERT of one layer that was pretrained: pooler and the head of the masked words, under torch's names."""
    torch.manual_seed(struct.unpack("I", hashlib.sha256(seed.encode()).digest()[:4])[0])
    weights = {}
    for name, rows in [("word", len(VOCABULARY)), ("position", POSITIONS), ("token_type", 2)]:
        weights[f"bert.embeddings.{name}_embeddings.weight"] = _random(rows, HIDDEN)
    layer = "bert.encoder.layer.0"
    for name, rows, columns in [
        *((f"{layer}.attention.self.{name}", HIDDEN, HIDDEN) for name in ("query", "key", "value")),
        (f"{layer}.attention.output.dense", HIDDEN, HIDDEN),
        (f"{layer}.intermediate.dense", INTERMEDIATE, HIDDEN),
        (f"{layer}.output.dense", HIDDEN, INTERMEDIATE),
        ("bert.pooler.dense", HIDDEN, HIDDEN),
        ("cls.predictions.transform.dense", HIDDEN, HIDDEN),
    ]:
        weights |= {f"{name}.weight": _random(rows, columns), f"{name}.bias": _random(rows)}
    for name in ("bert.embeddings", f"{layer}.attention.output", f"{layer}.output", "cls.predictions.transform"):
        weights |= {f"{name}.LayerNorm.weight": 1 + _random(HIDDEN), f"{name}.LayerNorm.bias": _random(HIDDEN)}
    weights["cls.predictions.bias"] = _random(len(VOCABULARY))
    return weights


def torch_file(weights: dict[str, torch.Tensor], legacy: bool) -> bytes:
    """As torch.save wrote it before 1.6, or as it has written it since (a zip file)."""
    file = io.BytesIO()
    torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def squad(folder: Path, config: str, version_2: bool, train: int, validation: int) -> Repository:
    """SQuAD as Parquet, and the card that says so."""
    files, splits = {}, ""
    for split, questions in (("train", train), ("validation", validation)):
        file = tiny_questions(Path(folder, f"{config}-{split}.json"), paragraphs=questions // 2, version_2=version_2)
        rows: Dataset = read_squad_file(file, cache_dir=str(folder / "cache"))
        buffer = io.BytesIO()
        rows.cast(as_strings(rows.features)).to_parquet(buffer)
        files[f"{config}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        splits += f"  - name: {split}\n    num_bytes: {rows.data.nbytes}\n    num_examples: {len(rows)}\n"
    strings = "".join(f"  - name: {name}\n    dtype: string\n" for name in ("id", "title", "context", "question"))
    answers = "  - name: answers\n    sequence:\n    - name: text\n      dtype: string\n"
    answers += "    - name: answer_start\n      dtype: int32\n"
    data_files = "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("train", "validation"))
    files["README.md"] = (
        f"---\nlanguage:\n- en\nlicense: cc-by-sa-4.0\ntask_categories:\n- question-answering\npretty_name: SQuAD\n"
        f"dataset_info:\n  config_name: {config}\n  features:\n{strings}{answers}  splits:\n{splits}"
        f"  download_size: {sum(map(len, files.values()))}\n  dataset_size: 1\n"
        f"configs:\n- config_name: {config}\n  default: true\n  data_files:\n{data_files}---\n\n# SQuAD\n"
    ).encode()
    files[".gitattributes"] = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"
    return Repository(files)


def _random(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape)


def _vocab() -> bytes:
    return "".join(f"{word}\n" for word in VOCABULARY).encode()


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
