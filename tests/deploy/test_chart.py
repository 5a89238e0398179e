"""What the chart renders: valid Kubernetes for every value, and what it promises of each pod."""

import functools
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mesh.config import describe, load
from tests.deploy.tools import (
    CHART,
    NAMESPACE,
    ROOT,
    Manifest,
    binary,
    helm,
    of_kind,
    one,
    pod_specs,
    refusal,
    render,
)
from tests.deploy.values import ENGINES, EVERYTHING, MATRIX

# Of other projects: their schemas are not part of Kubernetes, so the fields that we rely on are looked at below.
FOREIGN = {"Certificate", "Issuer", "HTTPRoute", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
SERVICES = ("identity", "router", "analytics", "edge")
LONGEST_STREAM_S = 600


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render(EVERYTHING, tmp_path_factory.mktemp("values"))


def container(spec: Manifest) -> Manifest:
    (only,) = spec["containers"]
    return dict(only)


def plain_environment(spec: Manifest) -> dict[str, str]:
    """Variables of the only container; those of secrets have the secret's name and key."""
    found = {}
    for variable in container(spec)["env"]:
        source = variable.get("valueFrom", {}).get("secretKeyRef")
        found[variable["name"]] = f"{source['name']}/{source['key']}" if source else variable.get("value", "")
    return found


def test_linting_finds_nothing() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_whatever_is_chosen_is_valid_kubernetes(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = render(values, tmp_path)
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))
    for manifest in manifests:
        if manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
        else:
            assert manifest["spec"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"router": {"replica": 3}}, "replica"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"image": {"digest": "sha256:beef"}}, "digest"),
        ({"identity": {"existingSecret": ""}}, "existingSecret"),
        ({"identity": {"publicUrl": "http://api.example.com"}}, "publicUrl"),
        ({"identity": {"drainSeconds": 301}}, "drainSeconds"),
        ({"tls": {"mode": "secrets"}}, "secrets"),
        ({"analytics": {"exports": {"enabled": True}}}, "url"),
        ({"publicPaths": ["/metrics"]}, "publicPaths"),
        ({"trustedProxies": ["10.0.0.1"]}, "trustedProxies"),
        ({"tls": {"mode": "mesh"}, "ingress": {"grpc": {"enabled": True}}}, "tls.mode"),
        ({"network": {"peers": {"postgres": {"at": []}}}}, "postgres"),
        ({"network": {"peers": {"postgres": {"at": [{}]}}}}, "postgres"),
        ({"engines": {"x": {"model": "x"}}}, "engines"),
        ({"engines": {"smollm2": {**ENGINES["smollm2"], "drainSeconds": 60}}}, "engines.smollm2.drainSeconds"),
        ({"edge": {"drainSeconds": 599}}, "edge.drainSeconds"),
        ({"router": {"drainSeconds": 599}}, "router.drainSeconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert named in refusal(values, tmp_path)


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_no_pod_may_do_more_than_it_needs(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = render(values, tmp_path)
    accounts = {m["metadata"]["name"] for m in of_kind(manifests, "ServiceAccount")}
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & {m["kind"] for m in manifests}
    for name, spec in pod_specs(manifests).items():
        assert spec["serviceAccountName"] in accounts, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True, name
        assert pod["runAsUser"] >= 10_000, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for one_container in spec["containers"]:
            inner = one_container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False, name
            assert inner["readOnlyRootFilesystem"] is True, name
            assert inner["capabilities"] == {"drop": ["ALL"]}, name
            assert one_container["resources"]["limits"]["memory"], name


def test_chart_makes_no_secret_and_no_value_is_one(everything: list[Manifest]) -> None:
    assert not of_kind(everything, "Secret")
    for spec in pod_specs(everything).values():
        for variable in container(spec)["env"]:
            if variable["name"].endswith(("_URL", "_KEY")) and not variable["name"].endswith(("PUBLIC_URL", "S3_URL")):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
@pytest.mark.parametrize("service", SERVICES)
def test_every_variable_is_one_that_the_service_reads(service: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Wherever a service is run, by a server's pod or a migration's."""
    module = importlib.import_module(f"{service}.config")
    configuration = getattr(module, f"{service.title()}Config")
    known = {described.variable for described in describe(configuration)} | {"POD_NAME"}
    runs = 0
    for name, spec in pod_specs(render(values, tmp_path)).items():
        if container(spec)["command"][:3] != ["python", "-m", service]:
            continue
        runs += 1
        environment = plain_environment(spec)
        ours = {variable for variable in environment if not variable.startswith("AIAAS_ENGINE_")}
        assert ours <= known, name
        assert len(environment) == len(container(spec)["env"]), f"{name} sets a variable twice"
        # Any text will do for what a secret holds, but for keys.
        key = "A" * 43 + "="
        secrets = {v["name"]: key for v in container(spec)["env"] if "valueFrom" in v}
        if environment.get("AIAAS_IDENTITY_SMTP_URL"):
            secrets["AIAAS_IDENTITY_SMTP_URL"] = "smtps://user:password@mail.example.com:465"
        load(configuration, {**environment, **secrets})
    assert runs == (1 if service == "edge" else 2)


@pytest.mark.parametrize("service", SERVICES)
def test_pods_outlive_the_longest_stream(service: str, everything: list[Manifest]) -> None:
    kind = "StatefulSet" if service == "router" else "Deployment"
    spec = pod_specs(everything)[f"{kind}/aiaas-{service}"]
    environment = plain_environment(spec)
    drain_s = float(environment[f"AIAAS_{service.upper()}_DRAIN_S"])
    pause_s = container(spec)["lifecycle"]["preStop"]["sleep"]["seconds"]
    if service in ("edge", "router"):
        assert drain_s >= LONGEST_STREAM_S
    # The router then has 5 s to publish what it has.
    assert spec["terminationGracePeriodSeconds"] >= pause_s + drain_s + 10


def test_engines_outlive_the_longest_stream_and_get_time_by_their_size(everything: list[Manifest]) -> None:
    seconds = {}
    for name in ENGINES:
        spec = pod_specs(everything)[f"StatefulSet/aiaas-engine-{name}"]
        engine = container(spec)
        (timeout,) = [word for word in engine["args"] if word.startswith("--shutdown-timeout=")]
        drain_s = int(timeout.partition("=")[2])
        assert drain_s >= LONGEST_STREAM_S
        assert spec["terminationGracePeriodSeconds"] > drain_s
        probe = engine["startupProbe"]
        seconds[name] = probe["periodSeconds"] * probe["failureThreshold"]
    assert seconds == {"smollm2": 105, "llama-70b": 1155}
    limits = container(pod_specs(everything)["StatefulSet/aiaas-engine-llama-70b"])["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 4


def test_engines_are_registered_one_by_one_under_the_names_of_their_pods(everything: list[Manifest]) -> None:
    document = json.loads(one(everything, "ConfigMap", "aiaas-engines")["data"]["engines.json"])
    backends = {backend["backend_id"]: backend for backend in document}
    assert set(backends) == {"smollm2-0", "smollm2-1", "smollm2-2", "llama-70b-0"}
    headless = one(everything, "Service", "aiaas-engine-smollm2")
    assert headless["spec"]["clusterIP"] == "None"
    assert one(everything, "StatefulSet", "aiaas-engine-smollm2")["spec"]["serviceName"] == "aiaas-engine-smollm2"
    assert backends["smollm2-2"]["base_url"] == (
        f"http://aiaas-engine-smollm2-2.aiaas-engine-smollm2.{NAMESPACE}.svc.cluster.local:8000"
    )
    told = plain_environment(pod_specs(everything)["StatefulSet/aiaas-router"])
    assert backends["smollm2-0"]["credential_variable"] in told
    assert backends["llama-70b-0"]["credential_variable"] == ""


def test_engines_scale_on_what_waits_in_their_queue(everything: list[Manifest]) -> None:
    scaler = one(everything, "ScaledObject", "aiaas-engine-smollm2")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "aiaas-engine-smollm2"
    assert (scaler["minReplicaCount"], scaler["maxReplicaCount"]) == (1, 3)
    assert "vllm:num_requests_waiting" in scaler["triggers"][0]["metadata"]["query"]
    # Two that set the number would fight.
    assert "replicas" not in one(everything, "StatefulSet", "aiaas-engine-smollm2")["spec"]


@pytest.mark.parametrize("service", SERVICES)
def test_services_survive_nodes_and_grow(service: str, everything: list[Manifest]) -> None:
    kind = "StatefulSet" if service == "router" else "Deployment"
    workload = one(everything, kind, f"aiaas-{service}")
    labels = workload["spec"]["template"]["metadata"]["labels"]
    budget = one(everything, "PodDisruptionBudget", f"aiaas-{service}")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    scaler = one(everything, "HorizontalPodAutoscaler", f"aiaas-{service}")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": kind, "name": f"aiaas-{service}"}
    assert scaler["minReplicas"] >= 2
    assert "replicas" not in workload["spec"]
    spec = workload["spec"]["template"]["spec"]
    for spread in spec["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert {s["topologyKey"] for s in spec["topologySpreadConstraints"]} == {
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    }
    assert one(everything, "PriorityClass", spec["priorityClassName"])


@pytest.mark.parametrize("service", ["identity", "router", "analytics"])
def test_grpc_services_are_names_of_all_their_pods(service: str, everything: list[Manifest]) -> None:
    found = one(everything, "Service", f"aiaas-{service}")["spec"]
    assert found["clusterIP"] == "None"
    ports = {port["name"]: port["port"] for port in found["ports"]}
    kind = "StatefulSet" if service == "router" else "Deployment"
    pod = one(everything, kind, f"aiaas-{service}")["spec"]["template"]
    assert found["selector"].items() <= pod["metadata"]["labels"].items()
    assert ports == {port["name"]: port["containerPort"] for port in container(pod["spec"])["ports"]}
    targets = {
        value
        for spec in pod_specs(everything).values()
        for variable, value in plain_environment(spec).items()
        if variable.endswith(f"_{service.upper()}_TARGET")
    }
    assert targets == {f"dns:///aiaas-{service}.{NAMESPACE}.svc.cluster.local:{ports['grpc']}"}


def test_services_are_who_their_certificates_say(everything: list[Manifest]) -> None:
    from mesh.tls import dns_name

    for service in SERVICES:
        certificate = one(everything, "Certificate", f"aiaas-{service}")["spec"]
        assert certificate["dnsNames"] == [dns_name(service)]
        assert {"server auth", "client auth"} <= set(certificate["usages"])
        assert one(everything, "Issuer", certificate["issuerRef"]["name"])
        kind = "StatefulSet" if service == "router" else "Deployment"
        spec = pod_specs(everything)[f"{kind}/aiaas-{service}"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls"]
        assert volume["secret"]["secretName"] == certificate["secretName"]
        environment = plain_environment(spec)
        (mount,) = [m["mountPath"] for m in container(spec)["volumeMounts"] if m["name"] == "tls"]
        assert environment["AIAAS_TLS_CERTIFICATE_PATH"] == f"{mount}/tls.crt"
        assert environment["AIAAS_TLS_KEY_PATH"] == f"{mount}/tls.key"
        assert environment["AIAAS_TLS_CA_PATH"] == f"{mount}/ca.crt"


def test_migrations_come_before_everything_else(everything: list[Manifest]) -> None:
    jobs = [m for m in of_kind(everything, "Job") if "migrate" in m["metadata"]["name"]]
    assert len(jobs) == 3
    for job in jobs:
        annotations = job["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
        # What a hook needs must be there before it, as nothing of the release is yet.
        spec = job["spec"]["template"]["spec"]
        account = one(everything, "ServiceAccount", spec["serviceAccountName"])
        policy = one(everything, "NetworkPolicy", "aiaas-migrations")
        for earlier in (account, policy):
            assert earlier["metadata"]["annotations"]["helm.sh/hook"] == annotations["helm.sh/hook"]
            assert int(earlier["metadata"]["annotations"]["helm.sh/hook-weight"]) < int(
                annotations["helm.sh/hook-weight"]
            )
        assert "priorityClassName" not in spec
        assert not spec.get("volumes")


@pytest.mark.parametrize("kind", ["Ingress", "HTTPRoute"])
def test_the_world_reaches_the_edge_alone_and_not_its_metrics(kind: str, everything: list[Manifest]) -> None:
    spec = one(everything, kind, "aiaas")["spec"]
    if kind == "Ingress":
        rules = [path for rule in spec["rules"] for path in rule["http"]["paths"]]
        paths = {rule["path"] for rule in rules}
        services = {rule["backend"]["service"]["name"] for rule in rules}
        assert spec["tls"][0]["hosts"] == [rule["host"] for rule in spec["rules"]]
    else:
        paths = {match["path"]["value"] for rule in spec["rules"] for match in rule["matches"]}
        services = {backend["name"] for rule in spec["rules"] for backend in rule["backendRefs"]}
    assert services == {"aiaas-edge"}
    assert not {"/", "/metrics", "/health", "/ready"} & paths
    assert {"/v1", "/admin", "/analytics", "/oauth2", "/.well-known", "/scim"} <= paths
    assert {"/sign-in", "/sign-out", "/account", "/recover", "/invites"} <= paths


def test_grpc_of_clients_reaches_public_ports_alone(everything: list[Manifest], tmp_path: Path) -> None:
    (rule,) = one(everything, "Ingress", "aiaas-grpc")["spec"]["rules"]
    backends = {path["path"]: path["backend"]["service"] for path in rule["http"]["paths"]}
    for service in ("identity", "router", "analytics"):
        backend = backends.pop(f"/aiaas.{service}.v1.")
        assert backend == {"name": f"aiaas-{service}", "port": {"name": "grpc-public"}}
        (port,) = [
            p for p in one(everything, "Service", backend["name"])["spec"]["ports"] if p["name"] == "grpc-public"
        ]
        kind = "StatefulSet" if service == "router" else "Deployment"
        environment = plain_environment(pod_specs(everything)[f"{kind}/aiaas-{service}"])
        assert environment[f"AIAAS_{service.upper()}_PUBLIC_GRPC_ADDRESS"] == f"0.0.0.0:{port['port']}"
    assert not backends
    assert "grpc-public" not in json.dumps(render({}, tmp_path))


def test_ingress_passes_streams_and_whole_bodies_and_never_asks_twice(everything: list[Manifest]) -> None:
    ingress = one(everything, "Ingress", "aiaas")["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    edge = plain_environment(pod_specs(everything)["Deployment/aiaas-edge"])
    assert ingress[f"{prefix}proxy-buffering"] == "off"
    assert ingress[f"{prefix}proxy-next-upstream"] == "off"
    assert int(ingress[f"{prefix}proxy-body-size"]) > int(edge["AIAAS_EDGE_MAX_BODY_BYTES"])
    assert int(ingress[f"{prefix}proxy-read-timeout"]) > LONGEST_STREAM_S


def test_journals_outlive_their_routers(everything: list[Manifest]) -> None:
    router = one(everything, "StatefulSet", "aiaas-router")["spec"]
    assert router["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = router["volumeClaimTemplates"]
    (mount,) = [m for m in container(router["template"]["spec"])["volumeMounts"] if m["name"] == "journal"]
    environment = plain_environment(router["template"]["spec"])
    assert claim["metadata"]["name"] == "journal"
    assert Path(environment["AIAAS_ROUTER_JOURNAL_PATH"]).is_relative_to(mount["mountPath"])
    # LMDB's file and the snapshot beside it.
    gibibytes = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert gibibytes << 30 > int(environment["AIAAS_ROUTER_JOURNAL_LIMIT_BYTES"])
    assert environment["AIAAS_ROUTER_ADVERTISED_ADDRESS"].startswith("$(POD_NAME).aiaas-router.")
    assert next(v["name"] for v in container(router["template"]["spec"])["env"]) == "POD_NAME"


def test_monitors_find_the_ports_of_their_services(everything: list[Manifest]) -> None:
    services = of_kind(everything, "Service")
    monitors = of_kind(everything, "ServiceMonitor")
    assert len(monitors) == 5
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [service for service in services if wanted <= service["metadata"]["labels"].items()]
        assert found
        for service in found:
            assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_engines_metrics_have_one_name_whoever_asks(everything: list[Manifest]) -> None:
    relabelled = {
        monitor["metadata"]["name"]: monitor["spec"]["endpoints"][0].get("metricRelabelings")
        for monitor in of_kind(everything, "ServiceMonitor")
    }
    (rule,) = relabelled.pop("aiaas-engine")
    assert (rule["regex"], rule["replacement"]) == ("vllm_(.+)", "vllm:${1}")
    assert set(relabelled.values()) == {None}


def test_rules_are_those_of_the_repository_and_know_processes_by_the_jobs_of_monitors(
    everything: list[Manifest],
) -> None:
    rules = {manifest["metadata"]["name"]: manifest["spec"] for manifest in of_kind(everything, "PrometheusRule")}
    texts = {path.stem: path.read_text() for path in (ROOT / "deploy/monitoring/rules").glob("*.yaml")}
    assert rules == {f"aiaas-{name}": yaml.safe_load(text) for name, text in texts.items()}
    jobs = {m["spec"]["endpoints"][0]["relabelings"][0]["replacement"] for m in of_kind(everything, "ServiceMonitor")}
    named = set(re.findall(r'job="([^"]+)"', texts["platform"]))
    assert named == jobs - {"aiaas-engine"}


def test_dashboards_are_delivered_as_they_are(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    dashboard = {"title": "Requests", "panels": [{"expr": 'rate({{ "x" }}[5m])'}]}
    (chart / "files/dashboards/of_requests.json").write_text(json.dumps(dashboard))
    manifests = render({"monitoring": {"dashboards": True}}, tmp_path, chart)
    found = one(manifests, "ConfigMap", "aiaas-dashboards-of-requests")
    assert json.loads(found["data"]["of_requests.json"]) == dashboard
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_dashboards_of_the_repository_are_delivered_without_a_copy_of_them(everything: list[Manifest]) -> None:
    for path in (CHART.parents[1] / "dashboards/json").iterdir():
        found = one(everything, "ConfigMap", f"aiaas-dashboards-{path.stem}")
        assert json.loads(found["data"][path.name]) == json.loads(path.read_text())


@functools.cache
def _kubectl_version() -> str:
    import subprocess

    return subprocess.run(
        [binary("kubectl"), "version", "--client"], capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_kubectl_is_of_the_version_that_manifests_are_held_against() -> None:
    assert "v1.37" in _kubectl_version()
