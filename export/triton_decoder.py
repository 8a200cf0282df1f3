"""Decodes face crops (JPEG, PNG, WebP) to RGB uint8 [S, S, 3]: a model of Triton Inference Server's Python backend.

Copied into a model repository.  The server's Python needs opencv-python-headless and numpy, for server 2.51 below 2.
"""

import json
import os

MAX_BYTES, MAX_PIXELS = 32_000_000, 64_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # read when cv2 is imported

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        self.side = int(json.loads(args["model_config"])["parameters"]["side"]["string_value"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        encoded = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy()
        try:
            crops = np.stack([self.decode(row) for row in encoded.reshape(-1)])
        except ValueError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("crops", crops)])

    def decode(self, data):
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes: over the limit of {MAX_BYTES}")
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            image = None
        if image is None or image.shape[0] * image.shape[1] > MAX_PIXELS:
            raise ValueError("not a JPEG, PNG or WebP picture, or too large; send an encoded face crop")
        size = (self.side, self.side)
        if image.shape[:2] != size:
            shrinks = min(image.shape[:2]) > self.side
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return np.ascontiguousarray(image[:, :, ::-1])
