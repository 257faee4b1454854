"""Whether a Ray cluster answers, before Ray itself would try for minutes."""

import os

from ddm.errors import ConfigError

_ANSWER_S = 10  # for a Ray cluster to accept a connection


def check_ray_answers(key: str, address: str) -> None:
    """Raise `ConfigError` naming the key unless a gRPC server, as Ray's are, answers at `address`.

    An address without a port (`auto`) names a Ray on this machine, which `ray.init` finds or
    refuses at once.
    """
    target = address.removeprefix("ray://")
    if ":" not in target or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    import grpc  # which Ray needs too

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise ConfigError(
                f"{key} must be the HOST:PORT of a Ray cluster that answers, "
                f"got {address!r}, which did not in {_ANSWER_S} s"
            ) from error
