# Two images.  The versions are pinned by tag; pin the digests that your registry shows as well.
#   docker build --target serve --tag dtn-fast-serve .      dtn-fast serve, on CPUs
#   docker build --target triton --tag dtn-fast-triton .    NVIDIA Triton Inference Server, on a GPU
# compose.yaml runs both with a read-only file system, limits and a model folder mounted read-only.

FROM python:3.12.12-slim-bookworm AS build
# torch's builds for CPUs; torch of the default index brings 4 GB of CUDA libraries
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /venv
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /venv/bin/pip install --constraint constraints.txt ".[serve]"

FROM python:3.12.12-slim-bookworm AS serve
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
# not /readyz, which is 503 while all places are taken: a busy server is no broken one
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["dtn-fast", "serve", "--host", "0.0.0.0"]
CMD ["/model/dtn.onnx"]

# An .engine must come from this image's version of TensorRT; an .onnx file runs through the image's onnxruntime.
FROM nvcr.io/nvidia/tritonserver:25.10-py3 AS triton
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# for the decoder of dtn-fast repository
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt opencv-python-headless
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
CMD ["tritonserver", "--model-repository=/models", "--exit-on-error=true"]
