"""What every RPC passes on its way in, one file each; no interceptor knows a service.

The order matters: the request id is there for every log line, tracing and metrics see the error as it leaves, errors
turn exceptions into statuses, the deadline covers authentication too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import grpc

from mesh.auth import Authenticator
from mesh.interceptors.auth import AuthInterceptor
from mesh.interceptors.deadline import DeadlineInterceptor
from mesh.interceptors.errors import ErrorsInterceptor
from mesh.interceptors.metrics import MetricsInterceptor
from mesh.interceptors.origin import OriginInterceptor
from mesh.interceptors.tracing import tracing_interceptor
from mesh.policies import Decider
from mesh.request_signatures import SignatureVerifier


def chain(
    authenticator: Authenticator,
    *,
    signatures: SignatureVerifier | None = None,
    decider: Decider | None = None,
    asking_policies: Collection[str] = (),
    traced: bool = False,
    stream_timeout_s: float = 600.0,
    witnesses: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
    trusted_proxies: tuple[str, ...] = (),
) -> list[grpc.aio.ServerInterceptor[Any, Any]]:
    """The interceptors of every server of the platform, outermost first.

    Without `signatures` nobody is let in whose requests have to be signed, without `decider` nobody whose organization
    has policies. The handlers of `asking_policies` have them
    asked themselves. `traced` says whether spans go anywhere;
    `stream_timeout_s` ends streams whose caller set no deadline. `witnesses` are a service's own, which see every call
    as it is judged and as it ends. `trusted_proxies` (CIDR) say who the clients of a public address are.
    """
    return [
        OriginInterceptor(trusted_proxies),
        *([tracing_interceptor()] if traced else []),
        MetricsInterceptor(),
        ErrorsInterceptor(),
        DeadlineInterceptor(stream_timeout_s=stream_timeout_s),
        *witnesses,
        AuthInterceptor(authenticator, signatures, decider, asking_policies),
    ]
