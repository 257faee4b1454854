"""Webhooks: a signed POST when a job has ended, as standardwebhooks.com asks for it."""

import asyncio
import base64
import hashlib
import hmac
import http.client
import logging
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from ddm.errors import require
from serve.http.middleware import shown

log = logging.getLogger(__name__)

_PAUSES_S = (0.0, 5.0, 60.0)  # before each attempt
_TIMEOUT_S = 10.0
# Of its own: a receiver that does not answer keeps no thread from those that encode images.
_THREADS = ThreadPoolExecutor(4, "webhook")


def check_webhook(url: str, hosts: Collection[str]) -> None:
    """Raise `ConfigError` unless it is https and of a host, with its port if any, in the list."""
    try:
        parts = urlsplit(url)
        known = {host.lower() for host in hosts}
        fits = parts.scheme == "https" and parts.netloc.lower() in known and url.isprintable()
    except ValueError:
        fits = False
    fits = fits and url.isascii() and " " not in url
    listed = " ".join(hosts) or "there are none"
    require(fits, "webhook", f"be https and of a host in serve.jobs.webhook_hosts ({listed})", url)


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = hmac.digest(
        secret_key(secret), f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256
    )
    return f"v1,{base64.b64encode(signed).decode()}"


def secret_key(secret: str) -> bytes:
    """What signs: a secret `whsec_...` is base64, any other is text. Raises `ValueError`."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    return secret.encode()


async def deliver(url: str, secret: str, message_id: str, body: bytes) -> bool:
    """POST JSON, three times at most; returns whether it was received. No redirect is followed."""
    said: object = ""
    for pause_s in _PAUSES_S:
        await asyncio.sleep(pause_s)
        timestamp = str(int(time.time()))
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(secret, message_id, timestamp, body),
        }
        try:
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(_THREADS, post, url, body, headers)
        except (OSError, http.client.HTTPException) as error:
            said = error
        if isinstance(said, int) and 200 <= said < 300:
            return True
    log.warning("a webhook to %s failed: %s", shown(urlsplit(url).netloc), said)
    return False


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    """POST once; returns the status. Raises `OSError` and `HTTPException`."""
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT_S)
    try:
        path = parts.path or "/"
        connection.request("POST", f"{path}?{parts.query}" if parts.query else path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()
