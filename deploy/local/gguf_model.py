"""Turns a GGUF file of a Llama model into a folder that vLLM serves; never runs in the services' environment.

It needs torch, safetensors, tokenizers and gguf, which vLLM's environment has:
`python -m deploy.local.gguf_model MODEL.gguf FOLDER`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]  # vLLM's environment has it
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import (  # type: ignore[import-not-found]  # as above
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)

CONTROL_TOKEN = 3

TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Gguf:
    """The fields and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self.tensors = self._reader.tensors

    def field(self, name: str) -> Any:
        """The value of a field. Raises KeyError with its name where the file has none."""
        return self._reader.fields[name].contents()


def write_folder(source: Path, folder: Path) -> None:
    """Writes weights (bfloat16), configuration, tokenizer and chat template of a Llama model to `folder`.

    Raises ValueError for a model of another architecture.
    """
    gguf = _Gguf(source)
    if gguf.field("general.architecture") != "llama":
        raise ValueError(f"{source} holds a {gguf.field('general.architecture')} model, not a Llama model")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights(gguf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {name: gguf.field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    _write(folder / "config.json", _config(gguf, tokens, tied="lm_head.weight" not in weights))
    special = {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], "pad_token_id": tokens["padding"]}
    _write(folder / "generation_config.json", special)
    _tokenizer(gguf).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(gguf, tokens))
    (folder / "chat_template.jinja").write_text(gguf.field("tokenizer.chat_template"), encoding="utf-8")


def _weights(gguf: _Gguf) -> dict[str, torch.Tensor]:
    heads = gguf.field("llama.attention.head_count")
    key_value_heads = gguf.field("llama.attention.head_count_kv")
    weights = {}
    for tensor in gguf.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, layer, part = _split(tensor.name)
        if part == "attn_q":
            values = _unpermuted(values, heads)
        elif part == "attn_k":
            values = _unpermuted(values, key_value_heads)
        weights[f"model.layers.{layer}.{name}.weight" if layer else f"{name}.weight"] = torch.from_numpy(
            np.ascontiguousarray(values)
        ).to(torch.bfloat16)
    return weights


def _split(name: str) -> tuple[str, str, str]:
    """The new name of a tensor, its layer ("" outside the layers) and its old part: blk.3.attn_q.weight has all."""
    parts = name.split(".")
    if parts[0] == "blk":
        return LAYER_TENSORS[parts[2]], parts[1], parts[2]
    return TOP_TENSORS[parts[0]], "", parts[0]


def _unpermuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key matrix in Llama's own order: GGUF keeps the pairs of a rotation next to each other."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(gguf: _Gguf, tokens: dict[str, int], *, tied: bool) -> dict[str, Any]:
    width = gguf.field("llama.embedding_length")
    heads = gguf.field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": width,
        "head_dim": width // heads,
        "intermediate_size": gguf.field("llama.feed_forward_length"),
        "num_hidden_layers": gguf.field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.field("llama.attention.head_count_kv"),
        "max_position_embeddings": gguf.field("llama.context_length"),
        "rms_norm_eps": gguf.field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.field("llama.rope.freq_base"),
        "vocab_size": len(gguf.field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["padding"],
    }


def _tokenizer(gguf: _Gguf) -> Tokenizer:
    """Byte-level BPE; digits stand alone, as SmolLM2 was trained (GGUF's pre-tokenizer "smollm")."""
    pieces = gguf.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = gguf.field("tokenizer.ggml.token_type")
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return tokenizer


def _tokenizer_config(gguf: _Gguf, tokens: dict[str, int]) -> dict[str, Any]:
    pieces = gguf.field("tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokens["bos"]],
        "eos_token": pieces[tokens["eos"]],
        "unk_token": pieces[tokens["unknown"]],
        "pad_token": pieces[tokens["padding"]],
        "model_max_length": gguf.field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), Path(sys.argv[2]))
