"""Who comes in, who is turned away, and whether everything of it is written down."""

from deploy.dashboards.panels import board, graph, increase, number, quantiles, rate, share

_REFUSED = '{code=~"UNAUTHENTICATED|PERMISSION_DENIED"}'
_AUTHENTICATE = '{method="/aiaas.identity.v1.AuthService/Authenticate"}'
_SIGN_IN = '{method=~"/aiaas.identity.v1.(Session|Mfa|Federation|OAuth|Invite)Service/.*"}'
_UNTIL_END = "min by (job, certificate) (aiaas_certificate_expiry_timestamp_seconds) - time()"

DASHBOARD = board(
    "identity",
    "identity and security",
    "Who comes in, who is turned away, and whether everything of it is written down.",
    {
        "Now": [
            number(
                "Refused/s",
                "RPCs for want of a credential or of a permission.",
                "reqps",
                f"{rate('aiaas_grpc_server_requests_total', matchers=_REFUSED)} or vector(0)",
            ),
            number(
                "Not audited",
                "Attempts and decisions, in this time, that are in no log.",
                "short",
                f"({increase('aiaas_audit_unrecorded_attempts_total')} or vector(0))"
                f" + {increase('aiaas_policy_unrecorded_decisions_total')}",
            ),
            number(
                "First certificate ends in",
                "Of all processes.",
                "s",
                "min(aiaas_certificate_expiry_timestamp_seconds) - time()",
            ),
            number(
                "From the cache",
                "Share of credentials that nobody had to ask identity for.",
                "percentunit",
                share("aiaas_authentications_total", '{source="cache"}'),
            ),
        ],
        "Credentials": [
            graph(
                "Resolved by",
                "stale: identity is away, and what was known goes on for a while.",
                "reqps",
                {"{{source}}": rate("aiaas_authentications_total", "source")},
            ),
            graph(
                "Authenticate",
                "How fast identity answers routers.",
                "s",
                quantiles("aiaas_grpc_server_request_duration_seconds", matchers=_AUTHENTICATE),
            ),
            graph(
                "Authenticate by code",
                "UNAUTHENTICATED are keys that are wrong, expired or revoked: many are somebody who tries.",
                "reqps",
                {"{{code}}": rate("aiaas_grpc_server_requests_total", "code", _AUTHENTICATE)},
            ),
        ],
        "Doors": [
            graph(
                "Refused RPCs",
                "By method and code.",
                "reqps",
                {"{{method}} {{code}}": rate("aiaas_grpc_server_requests_total", "method, code", _REFUSED)},
            ),
            graph(
                "Signing in",
                "Sessions, second factors, issuers, OAuth2 and invites, by method and code.",
                "reqps",
                {"{{method}} {{code}}": rate("aiaas_grpc_server_requests_total", "method, code", _SIGN_IN)},
            ),
            graph(
                "Connections refused",
                "By the edge, by cause.",
                "cps",
                {"{{cause}}": rate("aiaas_edge_connections_refused_total", "cause")},
            ),
        ],
        "Records": [
            graph(
                "Attempts that are not audited",
                "bounded: too many at once. failed: the log cannot be written.",
                "short",
                {"{{why}}": rate("aiaas_audit_unrecorded_attempts_total", "why")},
            ),
            graph(
                "Decisions that are not logged",
                "Of policies: too many wait to be written.",
                "short",
                {"dropped": rate("aiaas_policy_unrecorded_decisions_total")},
            ),
            graph(
                "Certificates",
                "Until each ends.",
                "s",
                {"{{job}} {{certificate}}": _UNTIL_END},
            ),
        ],
    },
)
