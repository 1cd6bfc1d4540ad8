"""An S3 service for tests, as a process of its own: moto, told to verify every signature.

Prints ``{"endpoint", "bucket", "key", "secret"}`` as JSON once it answers, and ends when its standard input does. Its argument
is for whoever looks for processes that were left behind.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any
from urllib.request import Request, urlopen

import boto3  # type: ignore[import-untyped]
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

BUCKET = "helmr-tests"
_POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


def main() -> None:
    """Serve."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    known = _user(endpoint)
    # From here on it takes only what is signed with a key that it knows, and by somebody who may.
    request = Request(  # noqa: S310  # our own address
        f"{endpoint}/moto-api/reset-auth", data=b"0", method="POST", headers={"Content-Type": "text/plain"}
    )
    with urlopen(request, timeout=30):  # noqa: S310
        pass
    print(json.dumps({"endpoint": endpoint, "bucket": BUCKET, **known}), flush=True)  # noqa: T201  # read by the test
    sys.stdin.read()
    os._exit(0)  # its threads would be waited for


def _user(endpoint: str) -> dict[str, str]:
    account: Any = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **account).create_bucket(Bucket=BUCKET)
    iam = boto3.client("iam", endpoint_url=endpoint, **account)
    iam.create_user(UserName="helmr")
    iam.put_user_policy(UserName="helmr", PolicyName="s3", PolicyDocument=json.dumps(_POLICY))
    made = iam.create_access_key(UserName="helmr")["AccessKey"]
    return {"key": made["AccessKeyId"], "secret": made["SecretAccessKey"]}


if __name__ == "__main__":
    main()
