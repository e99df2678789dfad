"""A stand-in for the Hugging Face Hub on loopback: the endpoints that the stock client needs to make a repository,
upload to it and download from it.

It keeps commits in memory, checks tokens, digests and YAML as the Hub does, and answers with its error codes.
`cut_uploads` makes it hang up in the middle of so many uploads.
"""

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, TOKEN = "me", "hf_right"


@dataclass
class Repository:
    private: bool = False
    # Commits by their digest, each the files by path; and the digest at the head of every branch.
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((branch, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[digest], self.heads[branch] = files, digest
        return digest

    def find(self, revision: str) -> str | None:
        return self.heads.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_uploads = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients hang up in some tests

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, values, status: int = 200) -> None:
        self.answer(status, json.dumps(values).encode(), content_type="application/json")

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        self.path_parts, self.query = (
            [unquote(part) for part in split.path.strip("/").split("/")],
            parse_qs(split.query),
        )
        self.server.requests.append(f"{self.command} {split.path}")
        length = int(self.headers.get("content-length", 0))
        if self.command == "PUT" and self.server.cut_uploads > 0:
            self.server.cut_uploads -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        try:
            self.route(self.path_parts)
        except Refused as error:
            self.answer(error.status, b"{}", x_error_code=error.code, x_error_message=error.message)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                self.check_token()
                self.answer_json(
                    {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
                )
            case ["api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self.validate(json.loads(self.body)["content"])
            case ["api", "models", owner, name, "branch", branch]:
                self.check_token()
                self.repository(owner, name).heads.setdefault(branch, self.repository(owner, name).heads["main"])
                self.answer(200)
            case ["api", "models", owner, name, "preupload", _]:
                self.check_token()
                files = json.loads(self.body)["files"]
                large = (".safetensors", ".png")
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self.answer_json({"files": modes})
            case ["api", "models", owner, name, "commit", revision]:
                self.check_token()
                self.commit(self.repository(owner, name), f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "revision", revision]:
                self.describe(owner, name, revision)
            case ["api", "models", owner, name]:
                self.describe(owner, name, "main")
            case ["api", "models", owner, name, "tree", revision]:
                files = self.files(owner, name, revision)[1]
                self.answer_json(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": digest(data)}
                        for path, data in files.items()
                    ]
                )
            case [_owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.check_token()
                objects = json.loads(self.body)["objects"]
                self.answer_json({"transfer": "basic", "objects": [self.offer(each) for each in objects]})
            case ["upload", oid]:
                self.store(oid)
            case [owner, name, "resolve", revision, *path]:
                self.resolve(owner, name, revision, "/".join(path))
            case _:
                raise Refused(404, "EntryNotFound", f"no endpoint {self.path}")

    def token_is_right(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if not self.token_is_right():
            raise Refused(401, "", "Invalid username or password.")

    def repository(self, owner: str, name: str) -> Repository:
        found = self.server.repositories.get(f"{owner}/{name}")
        # As on the Hub, a private repository is not found by others.
        if found is None or (found.private and not self.token_is_right()):
            raise Refused(404 if self.token_is_right() else 401, "RepoNotFound", "Repository not found")
        return found

    def files(self, owner: str, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(owner, name)
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def create(self, wanted: dict) -> None:
        self.check_token()
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        existed = name in self.server.repositories
        if not existed:
            self.server.repositories[name] = repository = Repository(
                wanted.get("private") or wanted.get("visibility") == "private"
            )
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer_json({"url": f"{self.server.address}/{name}", "id": name}, 409 if existed else 200)

    def validate(self, card: str) -> None:
        lines = card.split("\n")
        try:
            values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])) if lines[0] == "---" else {}
        except (ValueError, yaml.YAMLError) as error:
            return self.answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = [
            f"{name} must be a text"
            for name in ("license", "library_name", "pipeline_tag")
            if not isinstance(values.get(name, ""), str)
        ]
        errors += ["model-index needs names and results"] * any(
            not (each.get("name") and each.get("results")) for each in values.get("model-index", [])
        )
        return self.answer_json(
            {"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200
        )

    def offer(self, wanted: dict) -> dict:
        known = wanted["oid"] in self.server.stored
        actions = (
            {}
            if known
            else {"actions": {"upload": {"href": f"{self.server.address}/upload/{wanted['oid']}", "header": {}}}}
        )
        return {"oid": wanted["oid"], "size": wanted["size"], **actions}

    def store(self, oid: str) -> None:
        if digest(self.body) != oid:
            raise Refused(400, "", "wrong digest")
        self.server.stored[oid] = self.body
        self.answer(200)

    def commit(self, repository: Repository, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        if (parent := repository.find(revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        request = sum(branch.startswith("refs/pr/") for branch in repository.heads) + 1
        asked = "create_pr" in self.query
        digest = repository.commit(f"refs/pr/{request}" if asked else revision, files)
        address = f"{self.server.address}/{name}"
        answer = {"success": True, "commitOid": digest, "commitUrl": f"{address}/commit/{digest}", "hookOutput": ""}
        self.answer_json(answer | ({"pullRequestUrl": f"{address}/discussions/{request}"} if asked else {}))

    def describe(self, owner: str, name: str, revision: str) -> None:
        commit, files = self.files(owner, name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.repository(owner, name).private
        self.answer_json(
            {
                "id": f"{owner}/{name}",
                "modelId": f"{owner}/{name}",
                "sha": commit,
                "siblings": siblings,
                "private": private,
                "tags": [],
            }
        )

    def resolve(self, owner: str, name: str, revision: str, path: str) -> None:
        commit, files = self.files(owner, name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"no file {path}")
        self.answer(200, files[path], x_repo_commit=commit, etag=f'"{digest(files[path])}"', accept_ranges="bytes")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
