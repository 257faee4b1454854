"""On Ray Serve: a deployment per expert or group of experts, and the sampling service (router,
engine, HTTP) as ingress.

`serve deploy docker/serve.yaml` and `python -m serve RUN serve.placement=ray` both use `build`.
"""

import os

# Ray reads these when it is imported, and the processes that it starts inherit them. gRPC takes an
# expert's reply directly from process to process, in a third of the object store's time.
RAY_ENV = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 1024 * 1024),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who claims no GPU sees none
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.limits:proxy_middlewares",
}
for _key, _value in RAY_ENV.items():
    os.environ.setdefault(_key, _value)

from serve.ray_app.application import build  # noqa: E402

__all__ = ["RAY_ENV", "build"]
