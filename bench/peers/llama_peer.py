"""llama.cpp through llama-cpp-python as a rival (`serving`); KIND: F32, Q8_0 or Q4_0.

The model is written as GGUF by the `gguf` package and quantised by llama.cpp itself. One sequence a row, one token a sequence and step, as a
server decodes; all options but sizes and threads are llama.cpp's own defaults (flash attention where it helps, an fp16 cache).
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
from serving import Rival, main

ROWS, POSITIONS = 32, 640  # sequences at once, positions of each

NAMES = {
    "input_layernorm.weight": "attn_norm.weight", "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
}  # fmt: skip


def convert(folder: Path, kind: str) -> None:
    source, out = folder / "F32.gguf", folder / f"{kind}.gguf"
    if not source.exists():
        write(folder, source)
    if not out.exists():
        p = ll.llama_model_quantize_default_params()
        p.ftype = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
        if ll.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(p)):
            raise SystemExit(f"llama.cpp could not quantise to {kind}")


def write(folder: Path, out: Path) -> None:
    """The checkpoint as F32 GGUF without a vocabulary."""
    import gguf
    from safetensors.numpy import load_file

    c, part = json.loads((folder / "config.json").read_text()), out.with_suffix(".part")
    w = gguf.GGUFWriter(str(part), "llama")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_dimension_count(c["head_dim"])
    w.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(0)
    for name, value in load_file(folder / "model.safetensors").items():
        w.add_tensor(*renamed(name, value.astype(np.float32), c))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.rename(part, out)


def renamed(name: str, value: np.ndarray, c: dict[str, Any]) -> tuple[str, np.ndarray]:
    """llama.cpp's name, and the weights: rows of queries and keys are permuted to its rotary layout (neighbours are a pair)."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in top:
        return top[name], value
    _, _, layer, rest = name.split(".", 3)
    for part, heads in (("q_proj", c["num_attention_heads"]), ("k_proj", c["num_key_value_heads"])):
        if part in rest:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    return f"blk.{layer}.{NAMES[rest]}", np.ascontiguousarray(value)


class LlamaCpp(Rival):
    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), ll.llama_model_default_params())
        p = ll.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = ROWS * POSITIONS, 2048, 512, ROWS
        p.n_threads = p.n_threads_batch = threads
        self.context = ll.llama_init_from_model(self.model, p)
        self.memory = ll.llama_get_memory(self.context)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.batch = ll.llama_batch_init(2048, 0, 1)
        self.past = 0
        self.facts = {"version": f"llama-cpp-python {ll.__version__}", "weights": kind, "cache": "fp16"}

    def forget(self) -> None:
        ll.llama_memory_clear(self.memory, True)
        self.past = 0

    def prompt(self, rows: Sequence[Sequence[int]]) -> None:
        """One call a prompt, as the server does."""
        last = []
        for s, row in enumerate(rows):
            self.decode([(token, i, s, i == len(row) - 1) for i, token in enumerate(row)])
            last.append(self.outputs(1)[0].copy())
        self.past, self.logits = len(rows[0]), np.stack(last)
        self.choose()

    def forward(self) -> None:
        self.decode([(token, self.past, s, True) for s, token in enumerate(self.tokens)])
        self.past, self.logits = self.past + 1, self.outputs(len(self.tokens))

    def decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """One call over (token, position, sequence, whether its logits are wanted)."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        if ll.llama_decode(self.context, b):
            raise SystemExit("llama_decode failed")
        ll.llama_synchronize(self.context)

    def outputs(self, n: int) -> np.ndarray:
        """Logits [n, vocabulary] of the last call, in its order; overwritten by the next."""
        return np.ctypeslib.as_array(ll.llama_get_logits(self.context), (n, self.vocabulary))


QUIET = ll.llama_log_callback(lambda *said: None)

if __name__ == "__main__":
    ll.llama_log_set(QUIET, ctypes.c_void_p(0))
    main(LlamaCpp, convert)
