"""Files in a bucket of S3, over HTTP, on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def bucket(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Serve what is in a folder; the environment that a user sets to reach it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=address, **keys)
        client.create_bucket(Bucket=name)
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), name, f"of/images/{path.relative_to(folder)}")
        files = {"AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none", "AWS_ENDPOINT_URL": address}
        yield files | {
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.stop()
