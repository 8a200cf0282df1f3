"""Running of a model that NVIDIA Triton Inference Server holds (``dtn-fast repository``), over HTTP or gRPC."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import DtnError, UsageError, reason, tell
from dtn_fast.model.config import parse_config
from dtn_fast.packages import require
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.scorer import BATCH, COLUMNS, FEATURES, Scorer, side_by_side

MODEL = "dtn"
"""Name of the model when an address has none: the default of ``dtn-fast repository``."""
CONNECTIONS = 4
"""Number of requests of one scorer that the server answers at a time."""
REACH, ANSWER = 10.0, 120.0
"""Seconds that a connection, and the answer to a request, may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two tries to reach a server, doubled from the first to the longest."""
Answer = TypeVar("Answer")


class Address(NamedTuple):
    scheme: str
    """http or grpc."""
    host: str
    """Host and port."""
    model: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.model}"

    @property
    def server(self) -> str:
        return f"{self.scheme}://{self.host}"


def parse_address(text: str) -> Address:
    """Reads ``http://host:port[/model]`` or ``grpc://host:port[/model]``; a path with one slash for two reads alike.

    Raises UsageError on another form.
    """
    found = re.fullmatch(r"(http|grpc):/+([^/@\s]+:\d+)(?:/([^/\s]+))?/?", text)
    if found is None:
        raise UsageError(f"{text}: not a server's address; write http://host:8000/model or grpc://host:8001/model, "
                         f"or leave /model out for {MODEL!r}")  # fmt: skip
    return Address(found[1], found[2], found[3] or MODEL)


class Unreachable(Exception):
    """A server that cannot be reached, or is not ready: it may be later."""


class Refused(DtnError):
    """An answer of a server that is an error: the same request would be refused again."""


class Served(NamedTuple):
    """Facts of a served model."""

    batch: int
    """Largest batch of a request."""
    outputs: tuple[str, ...]
    parameters: dict[str, str]
    """dtn_config, notice and weights, as ``dtn-fast repository`` wrote them."""


class Connection:
    """A connection to a server, for the thread that makes it.

    Its methods raise Unreachable, Refused, and UsageError for a host that does not exist or a missing package.
    """

    def __init__(self, address: Address) -> None:
        self.address, http = address, address.scheme == "http"
        self._api = require(f"tritonclient.{address.scheme}")
        self._utils = require("tritonclient.utils")
        self._client = self._api.InferenceServerClient(
            address.host, **({"connection_timeout": REACH, "network_timeout": ANSWER} if http else {})
        )
        self._limit: dict[str, Any] = {} if http else {"client_timeout": ANSWER}
        self._json: dict[str, Any] = {} if http else {**self._limit, "as_json": True}

    def describe(self) -> Served:
        """Facts of the model.  Raises UsageError when there is no such server or model, naming the models there are."""
        name = self.address.model
        try:
            self._call("get_server_metadata", **self._limit)
        except Refused as error:
            raise UsageError(f"{self.address.server}: answers, but not as Triton Inference Server ({error})") from error
        try:
            config = self._call("get_model_config", name, **self._json)
        except Refused as error:
            row = self._index().get(name, {})
            if row.get("state") == "LOADING":
                raise Unreachable(f"it is loading {name!r}") from error
            problem = f"could not load {name!r} ({row['reason']})" if row.get("reason") else f"has no model {name!r}"
            raise UsageError(f"{self.address.server}: {problem}; {self._models()}") from error
        config = config.get("config", config)
        parameters = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
        if "dtn_config" not in parameters:
            raise UsageError(f"{self.address}: not a model that dtn-fast repository wrote; {self._models()}")
        outputs = tuple(output["name"] for output in config["output"])
        return Served(int(config["max_batch_size"]), outputs, parameters)

    def _index(self) -> dict[str, dict[str, str]]:
        """The server's models by name: state, and the reason why one is not loaded."""
        index = self._call("get_model_repository_index", **self._json)
        return {row["name"]: row for row in (index if isinstance(index, list) else index.get("models", []))}

    def _models(self) -> str:
        """The models that can be asked, in words."""
        names = sorted(name for name, row in self._index().items() if row.get("state") == "READY")
        return f"it serves {', '.join(names)}: name one, {self.address.server}/NAME" if names else "it serves none"

    def infer(self, crops: NDArray[np.uint8], outputs: list[str]) -> list[NDArray[Any]]:
        """The outputs named, of crops [B, S, S, 3]."""
        given = self._api.InferInput("crops", list(crops.shape), "UINT8")
        given.set_data_from_numpy(np.ascontiguousarray(crops))
        wanted = [self._api.InferRequestedOutput(name) for name in outputs]
        answer = self._call("infer", self.address.model, [given], outputs=wanted, **self._limit)
        try:
            return [answer.as_numpy(name) for name in outputs]
        except ValueError as error:
            raise Refused(f"{self.address}: its answer has not the shape that it states ({reason(error)}); server 2.51 "
                          "needs numpy<2 in its Python for --backend python") from error  # fmt: skip

    def statistics(self) -> dict[str, int]:
        """The model's counts since it was loaded, ``crops`` and ``executions``, and the nanoseconds of its requests,
        summed: in all (``total``), in the ``queue`` and in the model (``compute``)."""
        (row,) = self._call("get_inference_statistics", self.address.model, **self._json)["model_stats"]
        spent = {name: int(value.get("ns", 0)) for name, value in row["inference_stats"].items()}
        counts = {"crops": int(row.get("inference_count", 0)), "executions": int(row.get("execution_count", 0))}
        compute = sum(spent.get(f"compute_{part}", 0) for part in ("input", "infer", "output"))
        return {**counts, "total": spent.get("success", 0), "queue": spent.get("queue", 0), "compute": compute}

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self._client, method)(*args, **options)
        except self._utils.InferenceServerException as error:
            if error.status() in ("503", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                raise Unreachable(reason(error)) from error
            raise Refused(f"{self.address}: {error.message()}") from error
        except Exception as error:  # geventhttpclient's parser has its own classes; half an answer is no JSON
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                raise UsageError(f"{self.address.server}: no such host ({reason(error)})") from error
            raise Unreachable(reason(error)) from error


class TritonScorer(Scorer):
    """Scorer of a model on a server: crops are sent, the outputs that make its columns come back.

    A server that cannot be reached is tried again for ``patience`` seconds.  Raises UsageError as
    :meth:`Connection.describe` does, DtnError naming the server when it stays away, refuses a request, or comes back
    with another model.
    """

    def __init__(self, address: Address, patience: float) -> None:
        self.address, self.patience = address, patience
        self._local = threading.local()
        # HTTP connections live in the thread that made them, and leave two open files behind with each thread
        self._pool = ThreadPoolExecutor(CONNECTIONS, "server")
        self._served: Served | None = None
        self._served = self._patiently(Connection.describe)
        facts = self._served.parameters
        batch_size = max(1, min(self._served.batch, BATCH))
        config = parse_config(facts["dtn_config"], str(address))
        super().__init__(config, facts.get("notice", ""), f"Triton Inference Server {address}", batch_size)
        self.weights = facts.get("weights", "")
        # without features, as no temporal head runs here
        self._names = [name for name in COLUMNS if name in self._served.outputs and name != FEATURES]

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        outputs = self._patiently(lambda connection: connection.infer(crops, self._names))
        if outputs[0].shape != (len(crops), self.config.num_classes):
            raise DtnError(f"{self.address}: answered with logits {list(outputs[0].shape)} for {len(crops)} crops")
        return side_by_side(outputs)

    def _patiently(self, ask: Callable[[Connection], Answer]) -> Answer:
        """The answer to ``ask``, tried again while the server cannot be reached and patience lasts."""
        return self._pool.submit(self._try, ask).result()

    def _try(self, ask: Callable[[Connection], Answer]) -> Answer:
        begin, pause = None, FIRST_PAUSE
        while True:
            try:
                if getattr(self._local, "connection", None) is None:
                    self._local.connection = Connection(self.address)
                    if self._served is not None and self._local.connection.describe() != self._served:
                        raise DtnError(f"{self.address}: serves another model than before; run the same command again")
                return ask(self._local.connection)
            except Unreachable as error:
                self._local.connection = None
                begin = begin or time.monotonic()
                left = begin + self.patience - time.monotonic()
                if left <= 0:
                    raise DtnError(f"{self.address.server}: no answer in {self.patience:g} s of tries ({error}); start "
                                   "the server, or wait longer with --patience") from error  # fmt: skip
                tell(f"{self.address.server}: cannot be reached ({error}); trying again for {self.patience:g} s")
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)


def load(address: str, runtime: Runtime) -> TritonScorer:
    """Connects to the model at ``address``.  Raises UsageError and DtnError as TritonScorer does."""
    return TritonScorer(parse_address(address), runtime.patience)
