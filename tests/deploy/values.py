"""Values that the chart is rendered with: each that a deployment may choose, alone and together."""

from typing import Any

ENGINES = {
    "smollm2": {
        "model": "smollm2",
        "path": "smollm2",
        "existingClaim": "models",
        "billions": 0.135,
        "contextTokens": 2048,
        "endpoints": ["ENDPOINT_CHAT_COMPLETIONS", "ENDPOINT_COMPLETIONS"],
        "maxReplicas": 3,
        "keySecret": "engine-key",
    },
    "llama-70b": {
        "model": "meta/llama-3.3-70b",
        "path": "llama-3.3-70b",
        "existingClaim": "models",
        "billions": 70.6,
        "contextTokens": 131072,
        "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"],
        "gpu": {"count": 4},
        "args": ["--enable-auto-tool-choice", "--tool-call-parser=llama3_json"],
    },
}

EVERYTHING: dict[str, Any] = {
    "engines": ENGINES,
    "keda": {"enabled": True},
    "registration": {"existingSecret": "platform-key"},
    "monitoring": {"serviceMonitors": True, "dashboards": True, "rules": True},
    "gateway": {"enabled": True},
    "ingress": {"grpc": {"enabled": True}},
    "backup": {"enabled": True},
    "tracing": {"endpoint": "http://collector.monitoring:4317"},
    "analytics": {"exports": {"enabled": True, "url": "https://storage.example.com"}},
    "identity": {"mail": {"enabled": True}, "configurationConfigMap": "organizations"},
    "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "registry"}]},
}

# Who else is there: the namespace and the labels of a pod that stands for each peer, or its address.
PEERS: dict[str, Any] = {
    "ingress": ("ingress-nginx", {"app": "controller"}),
    "monitoring": ("monitoring", {"app": "prometheus"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "postgres": ("postgres", {"app": "postgres"}),
    "redis": ("redis", {"app": "redis"}),
    "rabbitmq": ("rabbitmq", {"app": "rabbitmq"}),
    "rabbitmq-management": ("rabbitmq-management", {"app": "rabbitmq"}),
    "traces": ("traces", {"app": "collector"}),
    "mail": ("mail", {"app": "mail"}),
    "storage": ("storage", {"app": "storage"}),
    "internet": "93.184.215.14",
    "stranger": ("strangers", {"app": "x"}),
    "metadata": "169.254.169.254",
    "neighbour": "10.9.8.7",
}
# A place of its own for each peer, so that no two are the same by accident.
APART = {
    "policies": True,
    "peers": {
        name: {"at": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": PEERS[name][0]}}}]}
        for name in ("postgres", "redis", "rabbitmq", "rabbitmq-management", "traces", "mail", "storage")
    },
}

MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "engines without a scaler": {"engines": ENGINES},
    "a service mesh": {"tls": {"mode": "mesh", "meshAnnotations": {"sidecar.istio.io/inject": "true"}}},
    "certificates made elsewhere": {
        "tls": {
            "mode": "secrets",
            "secrets": {name: f"{name}-tls" for name in ("identity", "router", "analytics", "edge")},
        }
    },
    "an issuer of the cluster": {"tls": {"issuer": {"name": "private-ca", "kind": "ClusterIssuer"}}},
    "one of each": {
        name: {"replicas": 1, "autoscaling": {"enabled": False}} for name in ("identity", "router", "analytics", "edge")
    },
    "no ingress, no policies, no classes": {
        "ingress": {"enabled": False},
        "network": {"policies": False},
        "priorityClasses": {"create": False},
    },
    "longer streams": {
        "edge": {"requestTimeoutSeconds": 3600, "drainSeconds": 3600, "workers": 4},
        "router": {"drainSeconds": 3700, "journal": {"storageClass": "fast"}},
    },
    "other names": {"nameOverride": "inference", "fullnameOverride": "inference", "clusterDomain": "example.org"},
}
