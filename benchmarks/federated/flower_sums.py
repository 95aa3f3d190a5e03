"""Flower's SecAgg+ on this machine: its own client and server code, messages passed from hand to hand in one process.

Runs in an environment of its own, without isthmus. ``python -P benchmarks/federated/flower_sums.py SILOS PARAMETERS
DROPPED SHARES THRESHOLD`` prints one JSON object. Each message takes the bytes it has on Flower's wire and is parsed
from them again. A sum of few numbers comes first, so that what is measured is of a warm process, as isthmus's is.

SHARES is the number of shares of each silo's key, one for itself and one for each neighbour it masks with: as many as
silos make the complete graph, fewer a sparse one. THRESHOLD is the number of shares that rebuild a key.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Stage
from flwr.common.secure_aggregation.secaggplus_constants import Key as SecAgg
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

RANGE = 0.5
WARM = 5
"""Silos and shares of the sum that warms up."""


class Hands:
    """A grid whose nodes are in this process; some never answer once they should send their numbers."""

    def __init__(self, updates: dict[int, np.ndarray], dropped: set[int]) -> None:
        self._updates, self._dropped = updates, dropped
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in updates}
        self.sent = dict.fromkeys(updates, 0)
        """Bytes, by node."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for message in messages if (reply := self._reply(message)) is not None]

    def _reply(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        told = message.content.config_records[RECORD_KEY_CONFIGS]
        if node in self._dropped and told[SecAgg.STAGE] == Stage.COLLECT_MASKED_VECTORS:
            return None
        message.content = _passed(message.content)[0]
        reply = secaggplus_mod(message, self._contexts[node], self._fit)
        reply.content, size = _passed(reply.content)
        self.sent[node] += size
        return reply

    def _fit(self, message: Message, context: Context) -> Message:
        learned = ndarrays_to_parameters([self._updates[context.node_id]])
        result = FitRes(Status(Code.OK, ""), learned, 1, {})
        return Message(compat.fitres_to_recorddict(result, keep_input=True), reply_to=message)


def _passed(content: RecordDict) -> tuple[RecordDict, int]:
    """The content after its way over the wire, and its bytes there."""
    data = recorddict_to_proto(content).SerializeToString()
    back = recorddict_to_proto(RecordDict())
    back.ParseFromString(data)
    return recorddict_from_proto(back), len(data)


class Everyone:
    """Enough of a client manager and of a client for the workflow."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self.nodes = list(nodes)

    def num_available(self) -> int:
        return len(self.nodes)


class Proxy:
    def __init__(self, node: int) -> None:
        self.node_id = node


class Strategy(FedAvg):
    """Asks all, and keeps what comes out."""

    def configure_fit(self, server_round, parameters, client_manager):  # type: ignore[no-untyped-def]
        return [(Proxy(node), FitIns(parameters, {})) for node in client_manager.nodes]

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return results[0][1].parameters, {}


def main(silos: int, parameters: int, dropped: int, shares: int, threshold: int) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0  # what its own launcher would set
    summed(WARM, 1000, 0, WARM, WARM - 1)
    print(json.dumps(summed(silos, parameters, dropped, shares, threshold)))


def summed(silos: int, parameters: int, dropped: int, shares: int, threshold: int) -> dict[str, float]:
    """One sum of drawn numbers."""
    draw = np.random.default_rng(0)
    updates = {node: draw.normal(0, 0.05, parameters).astype(np.float32) for node in range(1, silos + 1)}
    grid = Hands(updates, set(range(1, dropped + 1)))
    strategy = Strategy()
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord([np.zeros(1, np.float32)])
    context = LegacyContext(Context(1, 0, {}, state, {}), strategy=strategy, client_manager=Everyone(updates))
    workflow = SecAggPlusWorkflow(
        shares, threshold, max_weight=1.0, clipping_range=RANGE, quantization_range=2**16, modulus_range=2**32
    )
    started, processor = time.perf_counter(), time.process_time()
    workflow(grid, context)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    mean = np.mean([updates[node] for node in updates if node > dropped], axis=0)
    return {
        "seconds": seconds,
        "processor": processor,
        "bytes": float(np.mean([size for node, size in grid.sent.items() if node > dropped])),
        "error": float(np.abs(strategy.mean - mean).max()),
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
