"""Development, staging and production: namespaces with quotas, values that the chart takes, applications of Argo CD;
and what watches them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.tools import CHART, ROOT, Manifest, binary, of_kind, one, pod_specs, render

ENVIRONMENTS = ("development", "staging", "production")
OVERLAYS = ROOT / "deploy" / "kustomize" / "overlays"
ARGO = ROOT / "deploy" / "argocd"
MONITORING = ("kube-prometheus-stack", "loki", "tempo", "alloy")
WAVE = "argocd.argoproj.io/sync-wave"


def kustomized(environment: str) -> list[Manifest]:
    done = subprocess.run(
        [binary("kubectl"), "kustomize", str(OVERLAYS / environment)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def values(environment: str) -> dict[str, Any]:
    return dict(yaml.safe_load((OVERLAYS / environment / "values.yaml").read_text()))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_namespace_is_restricted_and_has_a_quota(environment: str) -> None:
    manifests = kustomized(environment)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    namespace = one(manifests, "Namespace", f"aiaas-{environment}")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    (quota,) = of_kind(manifests, "ResourceQuota")
    assert quota["metadata"]["namespace"] == f"aiaas-{environment}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_is_installed_fits_into_its_quota(environment: str, tmp_path: Path) -> None:
    (quota,) = of_kind(kustomized(environment), "ResourceQuota")
    manifests = render(values(environment), tmp_path)
    scalers = {m["spec"]["scaleTargetRef"]["name"]: m["spec"] for m in of_kind(manifests, "HorizontalPodAutoscaler")}
    cores = 0.0
    for name, spec in pod_specs(manifests).items():
        kind, workload = name.split("/")
        scaler = scalers.get(workload)
        replicas = scaler["minReplicas"] if scaler else 1
        for container in spec["containers"]:
            cpu = container["resources"]["requests"]["cpu"]
            each = float(cpu.removesuffix("m")) / 1000 if cpu.endswith("m") else float(cpu)
            cores += each * replicas
            # A quota on memory refuses pods that name none.
            assert container["resources"]["limits"]["memory"], kind
    assert cores < float(quota["spec"]["hard"]["requests.cpu"])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_application_installs_what_is_there(environment: str) -> None:
    application = yaml.safe_load((ARGO / "applications" / f"{environment}.yaml").read_text())["spec"]
    project = yaml.safe_load((ARGO / "applications" / "project.yaml").read_text())
    namespaces, chart = application["sources"]
    assert ROOT / namespaces["path"] == OVERLAYS / environment
    assert ROOT / chart["path"] == CHART
    (file,) = chart["helm"]["valueFiles"]
    assert (CHART / file).resolve() == OVERLAYS / environment / "values.yaml"
    assert application["project"] == project["metadata"]["name"]
    assert application["destination"] in project["spec"]["destinations"]
    assert {source["repoURL"] for source in application["sources"]} == set(project["spec"]["sourceRepos"])
    assert ("automated" in application["syncPolicy"]) is (environment != "production")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_project_allows_what_the_cluster_is_asked_for(environment: str, tmp_path: Path) -> None:
    project = yaml.safe_load((ARGO / "applications" / "project.yaml").read_text())["spec"]
    allowed = {entry["kind"] for entry in project["clusterResourceWhitelist"]}
    asked = {m["kind"] for m in [*kustomized(environment), *render(values(environment), tmp_path)]}
    assert asked & {"Namespace", "PriorityClass", "ClusterRole", "ClusterIssuer"} == allowed


def test_root_makes_all_applications() -> None:
    root = yaml.safe_load((ARGO / "root.yaml").read_text())["spec"]
    folder = ROOT / root["source"]["path"]
    assert {path.stem for path in folder.iterdir()} == {"project", *ENVIRONMENTS, "monitoring-project", *MONITORING}


def application(name: str) -> Manifest:
    return dict(yaml.safe_load((ARGO / "applications" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", MONITORING)
def test_what_watches_is_a_pinned_chart_with_our_values(name: str) -> None:
    spec = application(name)["spec"]
    ours, chart = spec["sources"]
    assert chart["chart"] == name
    assert re.fullmatch(r"\d+\.\d+\.\d+", chart["targetRevision"])
    (file,) = chart["helm"]["valueFiles"]
    assert yaml.safe_load((ROOT / file.removeprefix(f"${ours['ref']}/")).read_text())
    project = application("monitoring-project")
    assert spec["project"] == project["metadata"]["name"]
    assert spec["destination"] in project["spec"]["destinations"]
    assert {source["repoURL"] for source in spec["sources"]} <= set(project["spec"]["sourceRepos"])


def test_what_watches_is_there_before_what_is_watched() -> None:
    order = ("monitoring-project", "kube-prometheus-stack", "loki", "tempo", "alloy", "project", "production")
    waves = [int(application(name)["metadata"].get("annotations", {}).get(WAVE, 0)) for name in order]
    assert waves == sorted(waves)
    # The kinds of object that the platform's chart makes are the first chart's.
    assert waves[1] < waves[-1]


def test_what_watches_is_where_the_platform_looks_for_it() -> None:
    chart = yaml.safe_load((CHART / "values.yaml").read_text())
    namespace = application("tempo")["spec"]["destination"]["namespace"]
    for peer in ("monitoring", "traces"):
        (at,) = chart["network"]["peers"][peer]["at"]
        assert at["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == namespace
    assert chart["keda"]["prometheus"] == f"http://prometheus-operated.{namespace}.svc:9090"
    stack = yaml.safe_load((ARGO / "values" / "kube-prometheus-stack.yaml").read_text())
    assert stack["prometheus"]["prometheusSpec"]["serviceMonitorSelectorNilUsesHelmValues"] is False
    sidecar = stack["grafana"]["sidecar"]["dashboards"]
    assert f'{sidecar["label"]}: "{sidecar["labelValue"]}"' in (CHART / "templates" / "monitoring.yaml").read_text()
    urls = {source["name"].lower(): source["url"] for source in stack["grafana"]["additionalDataSources"]}
    for name, port in (("loki", 3100), ("tempo", 3200)):
        release = yaml.safe_load((ARGO / "values" / f"{name}.yaml").read_text())["fullnameOverride"]
        assert urls[name] == f"http://{release}.{namespace}.svc:{port}"
    assert f"{urls['loki']}/loki/api/v1/push" in (ARGO / "values" / "alloy.yaml").read_text()
    endpoint = yaml.safe_load((OVERLAYS / "production" / "values.yaml").read_text())["tracing"]["endpoint"]
    assert endpoint == urls["tempo"].replace("3200", "4317")
