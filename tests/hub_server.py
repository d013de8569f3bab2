"""A hub on the loopback interface that huggingface_hub, transformers and datasets talk to through HF_ENDPOINT.

It answers as the hub does, with its statuses, headers, redirects, pages and errors, and holds small repositories that
are laid out as the published ones. Large files come from a second server, as they do from the hub's CDN.
"""

import hashlib
import io
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import torch
import yaml
from datasets import Dataset
from safetensors.torch import save as safetensors_bytes
from tiny import PEOPLE, TOWNS, WORDS, tiny_questions
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from qa.read_squad import EXAMPLE_FEATURES, read_squad_file

LARGE = (".bin", ".h5", ".msgpack", ".parquet", ".safetensors")  # kept outside of git
LEGACY_NAMES = {
    ("models", "bert-base-uncased"): "google-bert/bert-base-uncased",
    ("models", "bert-large-uncased-whole-word-masking"): "google-bert/bert-large-uncased-whole-word-masking",
    ("datasets", "squad"): "rajpurkar/squad",
    ("datasets", "squad_v2"): "rajpurkar/squad_v2",
}
# Addresses, each with the kind and the id of a repository; an id of one word is a legacy name.
VERBS = "revision|tree|paths-info|auth-check"
API = rf"/api/(models|datasets)/([^/]+(?:/(?!(?:{VERBS})\b)[^/]+)?)(?:/(?P<verb>{VERBS})/?(?P<rest>.*))?"
CACHED = r"/api/resolve-cache/(models|datasets)/([^/]+/[^/]+)/[0-9a-f]{40}/(?P<file>.+)"
RESOLVE = r"/(datasets(?=/))?/?([^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"


# ---- Server ----


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False  # only those whose token stands in `admitted` get files
    admitted: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        names = sorted((name, _sha256(data)) for name, data in self.files.items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def entry(self, path: str) -> dict:
        data = self.files[path]
        entry = {"type": "file", "oid": _git_oid(data), "size": len(data), "path": path}
        if path.endswith(LARGE):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(data)}\nsize {len(data)}\n"
            entry["oid"] = _git_oid(pointer.encode())
            entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": len(pointer)}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """The entries under `folder` ("" is the root)."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path in sorted(path for path in self.files if path.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "oid": _git_oid(name.encode()), "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path)
        return list(entries.values())


class Hub:
    """Repositories by ("models" or "datasets", id), the `tokens` that it knows, and the paths of all `requests`."""

    def __init__(self, repositories: dict[tuple[str, str], Repository]):
        self.repositories = repositories
        self.tokens: set[str] = set()
        self.status: int | None = None
        self.break_off: dict[bytes, int] = {}
        self.requests: list[str] = []
        self._ports = (0, 0)
        self.start()
        self.url = f"http://127.0.0.1:{self._ports[0]}"
        self.storage_url = f"http://localhost:{self._ports[1]}"  # another host than the hub's, as clients see it

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
    def fault(self, status: int | None = None, break_off: dict[bytes, int] | None = None, stopped: bool = False):
        """Every request gets `status`; or the download of these contents ends after so many bytes; or none connects."""
        self.status, self.break_off = status, break_off or {}
        if stopped:
            self.stop()
        try:
            yield
        finally:
            self.status, self.break_off = None, {}
            if stopped:
                self.start()

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """The variables of a process that has nothing but this hub, and `home` for what it gets from there."""
        inherited = {k: v for k, v in os.environ.items() if not re.match(r"(HF|HUGGINGFACE|TRANSFORMERS)_", k)}
        return {**inherited, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **variables}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that has gone is no news


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        self.headers = headers | {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.hub.requests.append(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.hub.status is not None:
            self.send(self.hub.status, b"Internal Error - We're working hard to fix this as soon as possible!")
            return
        try:
            self.answer()
        except _Refusal as refusal:
            if self.path.startswith("/api/"):
                self.send_json({"error": refusal.message}, refusal.status, **refusal.headers)
            else:
                self.send(refusal.status, refusal.message.encode(), **refusal.headers)

    do_HEAD = do_POST = do_GET

    def send(self, status: int, content: bytes = b"", **headers: str):
        headers = {"Content_Type": "text/plain; charset=utf-8", "Content_Length": str(len(content))} | headers
        self.send_response(status)
        for name, value in (headers | {"X_Request_Id": f"Root=1-{len(self.hub.requests):08x}"}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            kept = self.hub.break_off.get(content)  # the headers promise all, the connection ends early
            self.wfile.write(content[:kept])
            self.close_connection = self.close_connection or kept is not None

    def send_json(self, value, status: int = 200, **headers: str):
        self.send(status, json.dumps(value).encode(), Content_Type="application/json; charset=utf-8", **headers)


class _CdnHandler(_Handler):
    def answer(self):
        held = [data for repository in self.hub.repositories.values() for data in repository.files.values()]
        data = next(data for data in held if _sha256(data) == self.path.removeprefix("/"))
        self.send(200, data, Content_Type="application/octet-stream", ETag=f'"{_git_oid(data)}"')


class _HubHandler(_Handler):
    def answer(self):
        path = unquote(self.path.partition("?")[0])
        api, cached, resolve = (re.fullmatch(pattern, path) for pattern in (API, CACHED, RESOLVE))
        wanted = api or cached or resolve
        if wanted is None:
            raise _Refusal(404, "Sorry, we can't find the page you are looking for.")
        kind, id_ = wanted[1] or "models", wanted[2]
        new_id = LEGACY_NAMES.get((kind, id_))
        if (kind, new_id) in self.hub.repositories:
            # Only the name changes; the address stays relative, and its escapes as they are.
            location = self.path.replace(f"/{id_}", f"/{new_id}", 1)
            raise _Refusal(307, f"Temporary Redirect. Redirecting to {location}", Location=location)
        repository = self.repository(kind, id_, files=not api or api["verb"] not in (None, "revision"))
        if cached:
            data = repository.files[cached["file"]]
            self.send(200, data, ETag=f'"{_git_oid(data)}"', X_Repo_Commit=repository.commit)
        elif resolve:
            self.check_revision(repository, resolve["revision"])
            self.redirect_to_file(kind, id_, repository, resolve["file"])
        else:
            self.answer_api(kind, id_, repository, api["verb"], api["rest"] or "")

    def answer_api(self, kind: str, id_: str, repository: Repository, verb: str | None, rest: str):
        revision, _, folder = rest.partition("/")
        if verb == "auth-check":
            return self.send(200, b"OK")
        self.check_revision(repository, revision or "main")
        if verb == "tree":
            return self.send_tree(repository, folder)
        if verb == "paths-info":
            paths = parse_qs(self.body).get("paths", [])
            return self.send_json([entry for entry in repository.tree("", recursive=True) if entry["path"] in paths])
        return self.send_json(self.facts(kind, id_, repository))

    def repository(self, kind: str, id_: str, files: bool) -> Repository:
        """Refuses where it is not there, or its `files` are not for everyone."""
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme and token not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get((kind, id_))
        if repository is None and scheme:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if repository is None:
            challenge = 'Bearer realm="Authentication required", charset="UTF-8"'
            raise _Refusal(401, "Invalid username or password.", WWW_Authenticate=challenge)
        if files and repository.gated and token not in repository.admitted:
            what = f"Access to {kind.removesuffix('s')} {id_} is restricted"
            if not scheme:
                text = f"{what}. You must have access to it and be authenticated to access it. Please log in."
                raise _Refusal(401, text, "GatedRepo")
            page = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id_}"
            raise _Refusal(403, f"{what} and you are not in the authorized list. Visit {page}", "GatedRepo")
        return repository

    def check_revision(self, repository: Repository, revision: str) -> None:
        if revision not in ("main", repository.commit):
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def facts(self, kind: str, id_: str, repository: Repository) -> dict:
        facts = {"_id": _sha256(id_.encode())[:24], "id": id_, "author": id_.split("/")[0], "sha": repository.commit}
        facts |= {"private": False, "gated": "auto" if repository.gated else False, "tags": []}
        facts["siblings"] = [{"rfilename": path} for path in sorted(repository.files)]
        return facts | ({"modelId": id_, "library_name": "transformers"} if kind == "models" else {})

    def send_tree(self, repository: Repository, folder: str):
        recursive = parse_qs(self.path.partition("?")[2]).get("recursive", ["false"])
        entries = repository.tree(folder, recursive=recursive[0].lower() in ("true", "1"))
        if not entries:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.send_json(entries)

    def redirect_to_file(self, kind: str, id_: str, repository: Repository, file: str):
        if file not in repository.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=repository.commit)
        data = repository.files[file]
        status, etag, location = 302, _sha256(data), f"{self.hub.storage_url}/{_sha256(data)}"
        if not file.endswith(LARGE):
            status, etag = 307, _git_oid(data)
            location = f"/api/resolve-cache/{kind}/{id_}/{repository.commit}/{quote(file)}"
        headers = {"X_Repo_Commit": repository.commit, "X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{etag}"'}
        self.send(status, f"Redirecting to {location}".encode(), Location=location, **headers)


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
VOCAB_TXT = "".join(f"{word}\n" for word in VOCABULARY).encode()


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
    weights = bert_weights(seed=1)
    positions = len(weights["bert.embeddings.position_embeddings.weight"])
    head = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    weights[head] = 0.1 * torch.randn(2 * positions - 1, 8)
    weights["bert.embeddings.position_ids"] = torch.arange(positions)[None]
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]  # tied, and shared
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    files = {
        "config.json": config_json(position_embedding_type, transformers_version="4.0.0-rc-1", directionality="bidi"),
        "pytorch_model.bin": torch_file(weights, legacy_file),
        "vocab.txt": VOCAB_TXT,
    }
    return Repository(files)


def google_bert(with_tokenizer_json: bool) -> Repository:
    """As Google's: safetensors under TensorFlow's names of LayerNorm, and files of other libraries beside it."""
    google = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {re.sub("|".join(google), lambda ours: google[ours[0]], n): w for n, w in bert_weights(seed=2).items()}
    files = {
        "config.json": config_json("absolute", transformers_version="4.6.0.dev0"),
        "flax_model.msgpack": b"not for us" * 20,
        "model.safetensors": safetensors_bytes(weights, metadata={"format": "pt"}),
        "tf_model.h5": b"not for us" * 30,
        "vocab.txt": VOCAB_TXT,
        "tokenizer_config.json": b'{"do_lower_case": true, "model_max_length": 512}',
    }
    if with_tokenizer_json:
        backend = BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}).backend_tokenizer
        files["tokenizer.json"] = backend.to_str().encode()
    return Repository(files)


def config_json(position_embedding_type: str, **settings) -> bytes:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, type_vocab_size=2)
    sizes |= dict(vocab_size=len(VOCABULARY), max_position_embeddings=512, pad_token_id=0, layer_norm_eps=1e-12)
    settings |= dict(architectures=["BertForMaskedLM"], model_type="bert", hidden_act="gelu", initializer_range=0.02)
    settings |= dict(attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1, gradient_checkpointing=False)
    settings |= dict(position_embedding_type=position_embedding_type, use_cache=True)
    return (json.dumps(sizes | settings, indent=2, sort_keys=True) + "\n").encode()


def bert_weights(seed: int) -> dict[str, torch.Tensor]:
    """Of a pretrained BERT: pooler, the heads of the masked words and of the next sentence, under torch's names."""
    torch.manual_seed(seed)
    model = BertForPreTraining(BertConfig.from_dict(json.loads(config_json("absolute"))))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    return {name: weight for name, weight in weights.items() if "decoder" not in name}  # tied


def torch_file(weights: dict[str, torch.Tensor], legacy: bool) -> bytes:
    """As torch.save wrote it before 1.6, or as it has written it since (a zip file)."""
    file = io.BytesIO()
    torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def squad(folder: Path, config: str, version_2: bool, train: int, validation: int) -> Repository:
    """SQuAD as Parquet, and the card that says so."""
    files, splits, data_files = {}, [], []
    for split, questions in (("train", train), ("validation", validation)):
        file = tiny_questions(Path(folder, f"{config}-{split}.json"), paragraphs=questions // 2, version_2=version_2)
        rows = Dataset.from_list(read_squad_file(file, folder).to_list(), features=EXAMPLE_FEATURES)
        buffer = io.BytesIO()
        rows.to_parquet(buffer)
        files[f"{config}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        splits.append({"name": split, "num_bytes": rows.data.nbytes, "num_examples": len(rows)})
        data_files.append({"split": split, "path": f"{config}/{split}-*"})
    info = {"config_name": config, "splits": splits, "download_size": 1, "dataset_size": 1}
    configs = [{"config_name": config, "default": True, "data_files": data_files}]
    card = yaml.safe_dump({"license": "cc-by-sa-4.0", "dataset_info": info, "configs": configs})
    return Repository(files | {"README.md": f"---\n{card}---\n\n# SQuAD\n".encode()})
