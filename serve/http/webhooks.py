"""Webhooks: a signed POST when a job has ended, as standardwebhooks.com asks for it."""

import asyncio
import base64
import hashlib
import hmac
import http.client
import logging
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from ddm.errors import require
from serve.http.middleware import shown

log = logging.getLogger(__name__)

_PAUSES_S = (0.0, 5.0, 60.0)  # before each attempt
_TIMEOUT_S = 10.0


def check_webhook(url: str, hosts: Collection[str]) -> None:
    """Raise `ConfigError` unless it is https and of a host, with its port if any, in the list."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme == "https" and parts.netloc.lower() in hosts and url.isprintable()
    except ValueError:
        fits = False
    fits = fits and url.isascii() and " " not in url
    known = " ".join(hosts) or "there are none"
    require(fits, "webhook", f"be https and of a host in serve.jobs.webhook_hosts ({known})", url)


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """The header `webhook-signature`. A secret `whsec_...` is base64, any other is text."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


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
            said = await asyncio.to_thread(post, url, body, headers)
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
