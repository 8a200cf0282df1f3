"""Runs the ONNX file beside it with onnxruntime: a model of Triton Inference Server's Python backend.

Copied into a model repository, for servers without the onnxruntime backend.  The server's Python needs onnxruntime
(onnxruntime-gpu for a GPU) and numpy, for server 2.51 below 2: its backend reads arrays of numpy 2 as one value
repeated, and answers with none.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        values = {key: value["string_value"] for key, value in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = int(values["intra_op_thread_count"])
        if values["optimise"] == "no":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        wanted = PROVIDERS[self.provider(args["model_instance_kind"], values["provider"])]
        device = {"device_id": args["model_instance_device_id"]}
        providers = [name if name == "CPUExecutionProvider" else (name, device) for name in wanted]
        file = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(file, options, providers=providers)
        if self.session.get_providers()[0] != wanted[0]:
            raise pb_utils.TritonModelException(f"onnxruntime fell back from {wanted[0]}; its libraries are missing")
        self.names = [output["name"] for output in config["output"]]

    def provider(self, kind, wanted):
        """Name in PROVIDERS; auto: cuda in an instance on a GPU, if this onnxruntime has it."""
        has_cuda = PROVIDERS["cuda"][0] in onnxruntime.get_available_providers()
        if wanted == "auto" and kind == "GPU" and not has_cuda:
            pb_utils.Logger.log_warn("this onnxruntime has no CUDA, so the model runs on the CPU")
        return wanted if wanted != "auto" else "cuda" if kind == "GPU" and has_cuda else "cpu"

    def execute(self, requests):
        """Runs the requests of one dynamic batch together and answers each."""
        crops = [pb_utils.get_input_tensor_by_name(request, "crops").as_numpy() for request in requests]
        found = self.session.run(self.names, {"crops": np.concatenate(crops)})
        ends = np.cumsum([len(part) for part in crops])[:-1]
        return [self.answer(parts) for parts in zip(*(np.split(values, ends) for values in found), strict=True)]

    def answer(self, parts):
        bad = max(int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum()) for values in parts)
        if bad:
            message = f"outputs of {bad} of {len(parts[0])} crops are not finite; use a model of higher precision"
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.names, parts, strict=True)])
