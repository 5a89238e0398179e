"""Terraform as text: formatted, every variable with its type and meaning, every module given what it declares, and
wrong values refused by Terraform itself. No provider is asked, so what Linode makes of it is not tried."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import CHART, CHECKS_PYTHON, ROOT

TERRAFORM = ROOT / "deploy" / "terraform"
FOLDERS = sorted({path.parent for path in TERRAFORM.rglob("*.tf")})
MODULES = [folder for folder in FOLDERS if folder.parent.name == "modules"]
# The reader of HCL is checkov's. In its documents every value is in a list.
READ = """
import json, sys, hcl2
print(json.dumps({path: hcl2.load(open(path)) for path in sys.argv[1:]}))
"""
META = {"source", "version", "count", "for_each", "providers", "depends_on"}

Blocks = dict[str, dict[str, Any]]


def without_lines(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if not key.startswith("__")}


@pytest.fixture(scope="module")
def read() -> dict[Path, dict[str, Blocks]]:
    """Of each folder its blocks by kind and name."""
    files = [str(path) for folder in FOLDERS for path in folder.glob("*.tf")]
    done = subprocess.run([CHECKS_PYTHON, "-c", READ, *files], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[Path, dict[str, Blocks]] = {folder: {} for folder in FOLDERS}
    for path, document in json.loads(done.stdout).items():
        for kind, blocks in document.items():
            for block in blocks:
                for name, content in without_lines(block).items():
                    kept = found[Path(path).parent].setdefault(kind, {})
                    if kind in ("resource", "data"):
                        name, content = next((f"{name}.{label}", inner) for label, inner in content.items())
                    assert name not in kept or kind == "terraform", f"{path}: {kind} {name} twice"
                    kept[name] = without_lines(content) if isinstance(content, dict) else content
    return found


def given(folder: Path, read: dict[Path, dict[str, Blocks]], kind: str) -> Blocks:
    return read[folder].get(kind, {})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_variables_and_outputs_say_what_they_are(folder: Path, read: dict[Path, dict[str, Blocks]]) -> None:
    for name, variable in given(folder, read, "variable").items():
        assert variable["type"][0], name
        assert variable["description"][0].endswith("."), name
    for name, output in given(folder, read, "output").items():
        assert output["description"][0], name
        text = json.dumps(output["value"])
        assert not re.search("password|secret_key|kubeconfig|ca_cert", text) or output["sensitive"] == [True], name
    assert given(folder, read, "variable")
    assert given(folder, read, "output")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_referred_to_is_there(folder: Path, read: dict[Path, dict[str, Blocks]]) -> None:
    text = json.dumps({kind: blocks for kind, blocks in read[folder].items() if kind != "terraform"})
    variables = given(folder, read, "variable")
    assert set(re.findall(r"\bvar\.(\w+)", text)) == variables.keys()
    assert set(re.findall(r"\b(linode_\w+\.\w+)\.", text)) <= given(folder, read, "resource").keys()
    assert set(re.findall(r"\blocal\.(\w+)", text)) == given(folder, read, "locals").keys()
    for name, module in given(folder, read, "module").items():
        source = (folder / module["source"][0]).resolve()
        assert source in MODULES, name
        declared = given(source, read, "variable")
        passed = module.keys() - META
        assert passed <= declared.keys(), f"{name}: {passed - declared.keys()}"
        required = {key for key, variable in declared.items() if "default" not in variable}
        assert required <= passed, f"{name}: {required - passed}"
        outputs = set(re.findall(rf"\bmodule\.{name}\.(\w+)", text))
        assert outputs <= given(source, read, "output").keys(), name
    assert set(re.findall(r"\bmodule\.(\w+)", text)) <= given(folder, read, "module").keys()


def test_the_example_uses_every_module(read: dict[Path, dict[str, Blocks]]) -> None:
    folder = TERRAFORM / "examples" / "production"
    used = {(folder / module["source"][0]).resolve() for module in given(folder, read, "module").values()}
    assert used == set(MODULES)
    assert "backend" in json.dumps(read[folder]["terraform"])


def test_engines_find_the_nodes_that_are_made_for_them(read: dict[Path, dict[str, Blocks]]) -> None:
    pool = given(TERRAFORM / "modules" / "cluster", read, "resource")["linode_lke_node_pool.gpu"]
    engine = yaml.safe_load((CHART / "values.yaml").read_text())["engineDefaults"]
    assert pool["labels"] == [engine["nodeSelector"]]
    (tolerated,) = engine["tolerations"]
    (taint,) = pool["taint"]
    assert (taint["key"], taint["effect"]) == ([tolerated["key"]], [tolerated["effect"]])


@pytest.fixture(scope="module")
def terraform() -> str:
    found = shutil.which("terraform")
    if found is None:
        pytest.skip("this machine has no terraform")
    return found


def test_everything_is_formatted(terraform: str) -> None:
    done = subprocess.run(
        [terraform, "fmt", "-check", "-recursive", str(TERRAFORM)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


POOL = {"type": "g6", "min": 3, "max": 4}
# By folder: values that are right, and for each variable with a rule one that is wrong, with what is said of it.
VALUES: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, str]]]] = {
    "network": (
        {"label": "aiaas", "region": "us-ord", "cidr": "10.1.0.0/22"},
        {
            "label": ("A", "3 to 30 lower case letters"),
            "region": ("chicago", "us-ord or us-iad-2"),
            "cidr": ("10.0.0.0/24", "of /22 or larger"),
        },
    ),
    "firewall": (
        {"label": "aiaas", "node_cidrs": ["10.0.0.0/20"], "balancer_cidrs": ["192.168.255.0/24"]},
        {
            "label": ("a b", "3 to 30 lower case letters"),
            "node_cidrs": ([], "At least one network"),
            "balancer_cidrs": (["0.0.0.0/0"], "none that is the whole internet"),
        },
    ),
    "cluster": (
        {
            "label": "aiaas",
            "region": "us-iad-2",
            "k8s_version": "v1.31.8+lke5",
            "vpc_id": 1,
            "subnet_id": 2,
            "firewall_id": 3,
            "administrator_cidrs": ["203.0.113.0/28"],
            "baseline": POOL,
            "gpu_pools": {"a": POOL},
        },
        {
            "label": ("", "3 to 30 lower case letters"),
            "region": ("us", "us-ord or us-iad-2"),
            "k8s_version": ("1.31", "v1.31.8+lke5"),
            "administrator_cidrs": (["::/0"], "none that is the whole internet"),
            "baseline": ({**POOL, "min": 2}, "At least three nodes"),
            "gpu_pools": ({"a": {**POOL, "max": 2}}, "At least one node in each pool"),
        },
    ),
    "database": (
        {"label": "aiaas", "region": "us-ord", "vpc_id": 1, "subnet_id": 2, "engine_version": "18"},
        {
            "label": ("-", "3 to 30 lower case letters"),
            "region": ("US", "us-ord or us-iad-2"),
            "engine_version": ("12", "is tested with 18"),
            "cluster_size": (4, "One, two or three"),
            "maintenance": ({"day_of_week": 0, "hour_of_day": 4}, "A day from 1 to 7"),
        },
    ),
    "storage": (
        {"label": "aiaas-exports", "region": "us-ord"},
        {
            "label": ("x", "3 to 30 lower case letters"),
            "region": ("", "us-ord or us-iad-2"),
        },
    ),
    "dns": (
        {"domain_id": 1, "name": "api", "ingress_ipv4": "192.0.2.1"},
        {"name": ("API", "lower case letters"), "ingress_ipv4": ("api.example.com", "an IPv4 address")},
    ),
    "production": (
        {
            "label": "aiaas",
            "region": "us-ord",
            "k8s_version": "v1.31.8+lke5",
            "administrator_cidrs": ["203.0.113.0/28"],
            "gpu_pools": {},
            "domain_id": 1,
        },
        {
            "label": ("a" * 22, "buckets add to it"),
            "region": ("x", "us-ord or us-iad-2"),
        },
    ),
}


def planned(terraform: str, folder: Path, values: dict[str, Any], place: Path) -> subprocess.CompletedProcess[str]:
    """A plan of a folder's variables alone, which needs no provider."""
    place.mkdir(exist_ok=True)
    shutil.copy(folder / "variables.tf", place)
    (place / "terraform.tfvars.json").write_text(json.dumps(values))
    return subprocess.run(
        [terraform, "plan", "-no-color", "-input=false"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=place,
        env={**os.environ, "CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": os.devnull},
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_wrong_values_are_refused_by_name(
    folder: Path, terraform: str, read: dict[Path, dict[str, Blocks]], tmp_path: Path
) -> None:
    right, wrong = VALUES[folder.name]
    ruled = {name for name, variable in given(folder, read, "variable").items() if "validation" in variable}
    assert wrong.keys() == ruled
    done = planned(terraform, folder, right, tmp_path / "right")
    assert done.returncode == 0, done.stderr
    for name, (value, words) in wrong.items():
        done = planned(terraform, folder, {**right, name: value}, tmp_path / name)
        assert done.returncode == 1, name
        said = " ".join(re.sub("[│╷╵]", " ", done.stderr).split())
        assert f"var.{name}" in said, name
        assert words in said, name
