"""Turns the folder of all-MiniLM-L6-v2 into a GGUF file for llama.cpp; never touches the folder.

The format's field and tensor names are llama.cpp's own for the "bert" architecture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, PoolingType
from safetensors.numpy import load_file

# llama.cpp's numbers for what a token is (llama_token_type).
NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN = 1, 2, 3
MOSTLY_F16 = 1
# SentencePiece's mark of the beginning of a word, which llama.cpp uses for WordPiece as well.
WORD_BEGINS = "\u2581"

EMBEDDING_TENSORS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
LAYER_TENSORS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
# Small, and read at every token: they stay exact.
EXACT_TENSORS = {"position_embd.weight", "token_types.weight"}


def write_gguf(folder: Path, target: Path) -> None:
    """Writes the model of a Hugging Face folder (config.json, vocab.txt, model.safetensors) as GGUF to `target`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    writer = GGUFWriter(target, "bert")
    _add_shape(writer, config)
    _add_tokenizer(writer, vocabulary)
    for name, values in load_file(folder / "model.safetensors").items():
        if new_name := _tensor_name(name):
            matrix = values.ndim == 2 and new_name not in EXACT_TENSORS
            writer.add_tensor(new_name, values.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_license("apache-2.0")
    writer.add_file_type(MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    # Every token sees every other, and the text's vector is the mean of its tokens' vectors.
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)


def _add_tokenizer(writer: GGUFWriter, vocabulary: list[str]) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_piece(token).encode() for token in vocabulary])
    writer.add_token_types([_token_type(token) for token in vocabulary])
    writer.add_token_type_count(2)
    writer.add_bos_token_id(vocabulary.index("[CLS]"))
    writer.add_eos_token_id(vocabulary.index("[SEP]"))
    writer.add_sep_token_id(vocabulary.index("[SEP]"))
    writer.add_unk_token_id(vocabulary.index("[UNK]"))
    writer.add_pad_token_id(vocabulary.index("[PAD]"))
    writer.add_mask_token_id(vocabulary.index("[MASK]"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _piece(token: str) -> str:
    """WordPiece marks what continues a word ("##ing"), llama.cpp what begins one."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else WORD_BEGINS + token


def _token_type(token: str) -> int:
    if token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
        return CONTROL_TOKEN
    return UNKNOWN_TOKEN if token == "[UNK]" else NORMAL_TOKEN  # noqa: S105 - a word of a vocabulary


def _tensor_name(name: str) -> str | None:
    """llama.cpp's name of a tensor; None for one that an embedding does not need."""
    if name in EMBEDDING_TENSORS:
        return EMBEDDING_TENSORS[name]
    if not name.startswith("encoder.layer."):
        return None
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_TENSORS[part]}.{kind}"
