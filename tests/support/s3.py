"""A real S3 server of the tests: moto's, in a thread, which can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
SECRET = "a-secret-that-nobody-may-see"


class _Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log_request(self, *_: object) -> None:
        pass


class S3Server:
    """Serves S3 on a free port of 127.0.0.1 until closed, with one empty bucket.

    Attributes:
        status: status that every request is answered with, such as ``503 Service Unavailable``; empty: as S3 does.
        status_of_posts: the same, of POST requests only.
        refused: ending of the paths whose upload is answered with 503; None: of none.
        requests: method and path of every request.
        env: environment by which s3fs finds it.
    """

    def __init__(self) -> None:
        self.status = self.status_of_posts = ""
        self.refused: str | None = None
        self.requests: list[tuple[str, str]] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="testing-key",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        is_refused = self.refused is not None and environ["PATH_INFO"].endswith(self.refused)
        status = self.status or (self.status_of_posts if environ["REQUEST_METHOD"] == "POST" else "")
        if status or (is_refused and environ["REQUEST_METHOD"] == "PUT"):
            # What was sent is read, else the client meets a closed connection.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status or "503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer

    def names(self, prefix: str = "") -> list[str]:
        """Keys of the bucket's objects."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for item in found.get("Contents", ())]

    def read(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def flip_a_bit(self, key: str) -> None:
        content = bytearray(self.read(key))
        content[len(content) // 2] ^= 1
        self.write(key, bytes(content))

    def close(self) -> None:
        self._server.shutdown()
