"""A Hugging Face Hub on 127.0.0.1: the part of its HTTP API that huggingface_hub uses for a model repository.

Files go through preupload, Git LFS (batch, PUT, verify) and commit, and come back through HEAD and GET of
``/owner/name/resolve/revision/file`` with the hub's headers; files of LFS by a redirect to a second server of another
origin, as the hub's go to its CDN, which serves ranges. What a test breaks is set in :class:`Faults`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData

TOKEN = 'hf_right'
LFS_SUFFIXES = ('.safetensors', '.bin', '.png')


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        cut: The CDN drops the connection after this many bytes, as often as there are numbers.
        corrupt: The CDN flips a byte of every file.
        statuses: Status codes by the part of the path that gets them, whatever is asked for.
        no_ranges: The CDN ignores ranges and sends everything again.
    """

    cut: list[int] = field(default_factory=list)
    corrupt: bool = False
    statuses: dict[str, int] = field(default_factory=dict)
    no_ranges: bool = False


@dataclass
class Repository:
    """Its branches and commits; a commit is its files: name to (content, whether it is of LFS)."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]]) -> str:
        """Add files to a branch; returns the commit's hash."""
        changed = {**self.commits.get(self.branches.get(branch, ''), {}), **files}
        content = [(name, hashlib.sha1(data).hexdigest()) for name, (data, _) in sorted(changed.items())]
        sha = hashlib.sha1(repr((content, self.branches.get(branch), branch)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = changed, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or a commit's own hash."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def git_hash(content: bytes) -> str:
    """Git's hash of a blob, which is the ETag of a file that is not of LFS."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class HubServer:
    """The hub and its CDN, until :meth:`stop`.

    Attributes:
        url: The hub's address.
        repositories, objects: What is there: repositories by name, files of LFS by SHA-256.
        moved: Old names of repositories and their new ones.
        log: Every request: (server, method, path, headers).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.faults = Faults()
        self.log: list[tuple[str, str, str, dict[str, str]]] = []
        self.connections: set[socket.socket] = set()
        self._hub, self.url = self._start(_Hub)
        self._cdn, self.cdn_url = self._start(_Cdn)

    def _start(self, handler: type) -> tuple[ThreadingHTTPServer, str]:
        server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        server.daemon_threads = True
        server.state = self
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return server, f'http://127.0.0.1:{server.server_port}'

    def stop(self) -> None:
        """Refuse connections from now on."""
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
        for connection in tuple(self.connections):  # clients keep theirs open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def files(self, repo: str, revision: str = 'main') -> dict[str, bytes]:
        """A repository's files."""
        repository = self.repositories[repo]
        return {name: content for name, (content, _) in repository.commits[repository.resolve(revision)].items()}

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> None:
        """Put files into a repository, without the API."""
        for content in files.values():
            self.objects[hashlib.sha256(content).hexdigest()] = content
        repository = self.repositories.setdefault(repo, Repository(private))
        repository.commit('main', {name: (data, name.endswith(LFS_SUFFIXES)) for name, data in files.items()})

    def ranges(self) -> list[str]:
        """The Range headers that the CDN was sent."""
        return [headers['range'] for server, _, _, headers in self.log if server == 'cdn' and 'range' in headers]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    name = ''

    @property
    def state(self) -> HubServer:
        return self.server.state

    def setup(self) -> None:
        super().setup()
        self.state.connections.add(self.connection)

    def finish(self) -> None:
        self.state.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""

    def begin(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.state.log.append((self.name, self.command, path, headers))
        if headers.get('transfer-encoding') == 'chunked':
            body = b''
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return path, body
        return path, self.rfile.read(int(headers.get('content-length', 0)))

    def answer(self, status: int, content: bytes | dict | list = b'', **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refused(self, path: str) -> bool:
        for part, status in self.state.faults.statuses.items():
            if part in path:
                self.answer(status, {'error': 'as the test wants it'})
                return True
        return False


class _Cdn(_Handler):
    name = 'cdn'

    def do_GET(self) -> None:
        path, _ = self.begin()
        content = self.state.objects.get(path.rpartition('/')[2])
        if content is None:
            return self.answer(404)
        faults = self.state.faults
        if faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if (wanted := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))) and not faults.no_ranges:
            start = int(wanted[1])
        part = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(part)))
        self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if faults.cut:
            self.wfile.write(part[:faults.cut.pop(0)])
            self.close_connection = True
            return None
        self.wfile.write(part)
        return None

    def do_PUT(self) -> None:
        path, body = self.begin()
        if self.refused(path):
            return None
        if hashlib.sha256(body).hexdigest() != path.rpartition('/')[2]:
            return self.answer(400)
        self.state.objects[path.rpartition('/')[2]] = body
        return self.answer(200)


class _Hub(_Handler):
    name = 'hub'

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def respond(self) -> None:
        path, body = self.begin()
        if self.refused(path):
            return
        routes: list[tuple[str, str, Callable]] = [
            ('POST', r'/api/repos/create', self.create),
            ('POST', r'/api/validate-yaml', self.validate),
            ('POST', r'/api/models/([^/]+/[^/]+)/branch/(.+)', self.branch),
            ('POST', r'/api/models/([^/]+/[^/]+)/preupload/(.+)', self.preupload),
            ('POST', r'/api/models/([^/]+/[^/]+)/commit/(.+)', self.commit),
            ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self.batch),
            ('POST', r'/([^/]+/[^/]+)/lfs/verify', self.verify),
            ('GET', r'/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?', self.information),
            ('HEAD GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.resolve),
        ]
        for methods, pattern, handle in routes:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                handle(body, *match.groups())
                return
        self.answer(404, {'error': f'the test server has no {self.command} {path}'})

    @property
    def has_token(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository, or an answer to the client that it is not to be had."""
        given = self.headers.get('Authorization')
        if given is not None and not self.has_token:
            return self.answer(401, {'error': 'Invalid credentials in Authorization header'},
                               X_Error_Message='Invalid credentials in Authorization header')
        found = self.state.repositories.get(name)
        if found is None or (found.private and not self.has_token):
            return self.answer(404 if self.has_token else 401, {'error': 'Repository not found'},
                               X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
        if write and not self.has_token:
            return self.answer(401, {'error': 'Unauthorized'})
        return found

    def create(self, body: bytes) -> None:
        if not self.has_token:
            return self.answer(401, {'error': 'Unauthorized'})
        wanted = json.loads(body)
        repo = f'{wanted.get("organization") or "me"}/{wanted["name"]}'
        status = 409 if repo in self.state.repositories else 200
        if status == 200:
            self.state.repositories[repo] = made = Repository(wanted.get('visibility') == 'private')
            made.commit('main', {'.gitattributes': (b'', False)})
        return self.answer(status, {'url': f'{self.state.url}/{repo}', 'name': repo})

    def validate(self, body: bytes) -> None:
        """As strict as huggingface_hub's own reader of metadata."""
        try:
            front = json.loads(body)['content'].split('---\n')[1]
            data = yaml.safe_load(front)
            assert {'license', 'library_name', 'pipeline_tag', 'tags'} <= data.keys()
            ModelCardData(**data, ignore_metadata_errors=False)
        except Exception as error:
            return self.answer(400, {'errors': [{'message': str(error)}], 'warnings': []})
        return self.answer(200, {'errors': [], 'warnings': []})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        if (found := self.repository(repo, write=True)) is None:
            return None
        if branch in found.branches:
            return self.answer(409, {'error': 'Reference already exists'})
        found.branches[branch] = found.branches['main']
        return self.answer(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.repository(repo, write=True)) is None:
            return None
        there = found.commits[found.resolve(revision)]
        answers = []
        for file in json.loads(body)['files']:
            is_lfs = file['path'].endswith(LFS_SUFFIXES)
            content = there.get(file['path'], (None,))[0]
            known = None if content is None else hashlib.sha256(content).hexdigest() if is_lfs else git_hash(content)
            answers.append({'path': file['path'], 'uploadMode': 'lfs' if is_lfs else 'regular',
                            'shouldIgnore': False, 'oid': known})
        return self.answer(200, {'files': answers})

    def batch(self, body: bytes, repo: str) -> None:
        if self.repository(repo, write=True) is None:
            return None
        answers = []
        for item in json.loads(body)['objects']:
            actions = {'upload': {'href': f'{self.state.cdn_url}/put/{item["oid"]}'},
                       'verify': {'href': f'{self.state.url}/{repo}/lfs/verify'}}
            answers.append({**item, **({} if item['oid'] in self.state.objects else {'actions': actions})})
        return self.answer(200, {'transfer': 'basic', 'objects': answers})

    def verify(self, body: bytes, repo: str) -> None:
        item = json.loads(body)
        content = self.state.objects.get(item['oid'])
        self.answer(200 if content is not None and len(content) == item['size'] else 404, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self.repository(repo, write=True)) is None:
            return None
        if revision not in found.branches:
            return self.answer(404, X_Error_Code='RevisionNotFound')
        files: dict[str, tuple[bytes, bool]] = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content']), False
            elif item['key'] == 'lfsFile':
                files[value['path']] = self.state.objects[value['oid']], True
        sha = found.commit(revision, files)
        return self.answer(200, {'commitUrl': f'{self.state.url}/{repo}/commit/{sha}', 'commitOid': sha})

    def information(self, body: bytes, repo: str, revision: str | None) -> None:
        if (found := self.repository(repo)) is None:
            return None
        sha = found.resolve(revision or 'main')
        if sha is None:
            return self.answer(404, X_Error_Code='RevisionNotFound')
        names = [{'rfilename': name} for name in found.commits[sha]]
        return self.answer(200, {'id': repo, 'sha': sha, 'private': found.private, 'siblings': names})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if repo in self.state.moved:
            return self.answer(307, Location=f'/{self.state.moved[repo]}/resolve/{revision}/{name}')
        if (found := self.repository(repo)) is None:
            return None
        sha = found.resolve(revision)
        if sha is None:
            return self.answer(404, X_Error_Code='RevisionNotFound')
        if name not in found.commits[sha]:
            return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        content, is_lfs = found.commits[sha][name]
        if not is_lfs:
            return self.answer(200, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=sha)
        digest = hashlib.sha256(content).hexdigest()
        return self.answer(302, X_Repo_Commit=sha, X_Linked_ETag=f'"{digest}"', X_Linked_Size=str(len(content)),
                           Location=f'{self.state.cdn_url}/get/{digest}')
