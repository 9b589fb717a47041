"""A stand-in for the Hugging Face Hub, which tests cannot reach.

It answers the requests that huggingface_hub makes to read and commit files of one dataset, as its source and the Hub's
API documentation describe them. That the real Hub answers in the same way is not tested.
"""

import base64
import hashlib
import json
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from remote_servers import Faults, Handler, Server


class HubServer:
    """The API of a Hub with one dataset.

    Args:
        folder: Its files.
        dataset: Its name, such as `user/features`.

    Attributes:
        url: The Hub's endpoint.
        faults: What goes wrong with requests for the content of shards.
        commits: The paths of each commit.
        token: Required for every request; None for a public dataset.
    """

    def __init__(self, folder, dataset):
        self.folder, self.dataset = Path(folder), dataset
        self.faults, self.token = Faults(), None
        self.commits = []
        self.objects = {}  # uploaded content by SHA-256, which a commit refers to
        self._server = Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def entry(self, path):
        """Return what the Hub's tree says about a file or folder."""
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        data = path.read_bytes()
        content = hashlib.sha256(data).hexdigest()
        found = {"type": "file", "path": name, "size": len(data), "oid": content[:40]}
        if path.suffix == ".h5":
            found["lfs"] = {"oid": content, "size": len(data), "pointerSize": 134}
        return found


def _handler(hub):
    api, name = f"/api/datasets/{hub.dataset}", f"/datasets/{hub.dataset}"
    missing = 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    class HubHandler(Handler):
        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            fault = hub.faults.draw() if "/resolve/" in path and ".h5" in path and self.command == "GET" else None
            with hub.faults.answering():
                self.send(*self.answer(path), fault)

        do_HEAD = do_POST = do_PUT = do_GET

        def answer(self, path):
            body = self.body()
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
            if path.startswith("/lfs/"):
                hub.objects[path.removeprefix("/lfs/")] = body
                return 200, {}, b""
            if path in (api, f"{api}/revision/main"):
                return _json({"id": hub.dataset, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            if path.startswith(f"{api}/tree/main"):
                return self.tree(path.removeprefix(f"{api}/tree/main").lstrip("/"))
            if path == f"{api}/paths-info/main":
                paths = [hub.folder / part for part in parse_qs(body.decode())["paths"]]
                return _json([hub.entry(part) for part in paths if part.exists()])
            if path == "/api/validate-yaml":  # asked for a README.md in the root
                return _json({"errors": [], "warnings": []})
            if path == f"{api}/preupload/main":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": file, "uploadMode": _mode(file), "shouldIgnore": False} for file in files]
                return _json({"files": modes})
            if path == f"{name}.git/info/lfs/objects/batch":
                return self.upload_places(json.loads(body)["objects"])
            if path == f"{api}/commit/main":
                return self.commit([json.loads(line) for line in body.splitlines()])
            if path.startswith(f"{name}/resolve/main/"):
                return self.content(hub.folder / path.removeprefix(f"{name}/resolve/main/"))
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def tree(self, inner):
            folder = hub.folder / inner
            return _json([hub.entry(path) for path in sorted(folder.iterdir())]) if folder.is_dir() else missing

        def upload_places(self, wanted):
            places = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}}
                for item in wanted
                if item["oid"] not in hub.objects
            ]
            return _json({"transfer": "basic", "objects": places})

        def commit(self, lines):
            added = []
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    continue
                is_object = line["key"] == "lfsFile"
                content = hub.objects[value["oid"]] if is_object else base64.b64decode(value["content"])
                (hub.folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (hub.folder / value["path"]).write_bytes(content)
                added.append(value["path"])
            hub.commits.append(added)
            return _json({"commitUrl": f"{hub.url}{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})

        def content(self, path):
            if not path.is_file():
                return missing
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if wanted is None:
                return 200, headers, data
            first, last = map(int, wanted.groups())
            part = data[first : last + 1]
            hub.faults.sent += len(part)
            return 206, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}, part

    return HubHandler


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _mode(path):
    return "lfs" if path.endswith(".h5") else "regular"
