"""One llama.cpp server with one model, run as a child of the local stack; never listens beyond this machine."""

import argparse
import os
import signal

import xllamacpp

# Requests that are answered at the same time; each has an equal share of the context.
CHAT_SLOTS = 8
EMBEDDING_SLOTS = 4


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local.llamacpp_server", description=__doc__)
    parser.add_argument("--model", required=True, help="path of the GGUF file")
    parser.add_argument("--name", required=True, help="the name that the model is served under")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--context-tokens", required=True, type=int, help="tokens of prompt and answer together")
    parser.add_argument("--embeddings", action="store_true", help="serve embeddings instead of text")
    arguments = parser.parse_args()

    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.model_alias = {arguments.name}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.endpoint_metrics = True
    parameters.embedding = arguments.embeddings
    parameters.n_parallel = EMBEDDING_SLOTS if arguments.embeddings else CHAT_SLOTS
    parameters.n_ctx = arguments.context_tokens * parameters.n_parallel
    if arguments.embeddings:
        # An embedding sees its whole text at once, so a text must fit into one batch.
        parameters.n_batch = parameters.n_ubatch = arguments.context_tokens * parameters.n_parallel
    # Its threads spin while they wait for each other: where others have taken the core of one, all of them stand still.
    threads = max(1, (os.cpu_count() or 1) // 2)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    print(f"listening on {server.listening_address}", flush=True)
    # The server runs on threads of its own; SIGTERM ends the process with them.
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
