"""An S3 server on this machine: moto's, a process of its own that speaks the protocol and keeps objects in memory."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "zerofleet-tests"


@contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """Run a server with an empty bucket; yields the environment with which every S3 client of a process finds it."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"],
            stdout=stream,
            stderr=stream,
        )
    try:
        environment = {
            "AWS_ENDPOINT_URL": _address(process, log),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        subprocess.run(
            [sys.executable, "-c", f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})"],
            env=environment,
            check=True,
        )
        yield environment
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What the server says once it listens."""
    while process.poll() is None:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    raise RuntimeError(f"the S3 server ended with code {process.returncode}: {log.read_text()}")
