"""OpenVINO, the runtime under OpenVINO GenAI, as a rival (`serving`); KIND: fp or int8 (weights, by channel).

The model is exported by optimum-intel with its cache as state, as GenAI runs it. The runtime is driven directly, so nothing of a pipeline's
own cost is counted. All options but the number of threads are OpenVINO's defaults: where the processor multiplies bf16, it computes in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from serving import Rival, main


def convert(folder: Path, kind: str) -> None:
    out = folder / f"openvino-{kind}"
    if (out / "openvino_model.xml").exists():
        return
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(bits=8) if kind == "int8" else None
    model = OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False, quantization_config=config)
    model.save_pretrained(out)


class OpenVino(Rival):
    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        model = ov.Core().compile_model(folder / f"openvino-{kind}" / "openvino_model.xml", "CPU", options)
        self.request = model.create_infer_request()
        self.names = {name for i in model.inputs for name in i.names}
        precision = model.get_property("INFERENCE_PRECISION_HINT").to_string()
        cache = model.get_property("KV_CACHE_PRECISION").to_string()
        self.facts = {"version": f"openvino {ov.__version__}", "weights": "int8" if kind == "int8" else precision, "cache": cache}
        self.past = 0

    def forget(self) -> None:
        self.request.reset_state()
        self.past = 0

    def prompt(self, rows: Sequence[Sequence[int]]) -> None:
        self.infer(np.array(rows, np.int64))
        self.choose()

    def forward(self) -> None:
        self.infer(np.array(self.tokens, np.int64)[:, None])

    def infer(self, ids: np.ndarray) -> None:
        """ids [rows, n] after `past` positions."""
        rows, n = ids.shape
        inputs = {"input_ids": ids, "attention_mask": np.ones((rows, self.past + n), np.int64)}
        if "position_ids" in self.names:
            inputs["position_ids"] = np.tile(np.arange(self.past, self.past + n), (rows, 1))
        if "beam_idx" in self.names:
            inputs["beam_idx"] = np.arange(rows, dtype=np.int32)
        self.request.infer(inputs)
        self.past += n
        self.logits = self.request.get_tensor("logits").data[:, -1]


if __name__ == "__main__":
    main(OpenVino, convert)
