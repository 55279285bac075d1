"""Flower's SecAgg+ on random vectors, by its own workflow and client mod, in one process without a network.

Run by benchmarks/secure_sum.py with the interpreter of Flower's environment; prints one line of JSON.
python flower_secagg.py PARTIES TENSORS VALUES_A_TENSOR
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

PARTIES, TENSORS, VALUES = map(int, sys.argv[1:4])


def update_of(party: int) -> list[np.ndarray]:
    """Return a party's update: the vectors that fedllm's side of the table sums, too."""
    draw = np.random.default_rng(party)
    return [draw.standard_normal(VALUES, dtype=np.float32) * np.float32(1e-3) for _ in range(TENSORS)]


class Proxy:
    """A client as the strategy sees it."""

    def __init__(self, number: int) -> None:
        self.node_id, self.cid = number, str(number)


class Strategy(FedAvg):
    """Takes all clients, and keeps what the sum was."""

    mean: list[np.ndarray]

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Return one order for each client."""
        return [(Proxy(number), FitIns(parameters, {})) for number in range(1, PARTIES + 1)]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Keep the mean that the workflow made."""
        self.mean = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


def context() -> Context:
    """Return an empty context."""
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})


class Grid:
    """Hands each message to its client's mod at once."""

    def __init__(self) -> None:
        self.contexts = {number: context() for number in range(1, PARTIES + 1)}
        self.updates = {number: update_of(number) for number in self.contexts}
        self.bytes_up = 0
        self.not_counted_s = 0.0

    def send_and_receive(self, messages: list[Any], *, timeout: float | None = None) -> list[Any]:
        """Return the clients' answers."""
        answers = []
        for message in messages:
            number = message.metadata.dst_node_id
            # Messages share their configuration here, which a network would not, and clients take it apart.
            message.__dict__["_content"] = _copy(message.content)
            answer = secaggplus_mod(message, self.contexts[number], self._trained)
            started = time.perf_counter()
            self.bytes_up += sum(_size(record) for record in answer.content.config_records.values())
            self.not_counted_s += time.perf_counter() - started
            answers.append(answer)
        return answers

    def _trained(self, message: Any, ctxt: Any) -> Any:
        update = self.updates[message.metadata.dst_node_id]
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(update), 100 * message.metadata.dst_node_id, {})
        return Message(compat.fitres_to_recorddict(result, False), reply_to=message)


def _copy(content: RecordDict) -> RecordDict:
    configs = {name: ConfigRecord(dict(record)) for name, record in content.config_records.items()}
    return RecordDict({**content.array_records, **content.metric_records, **configs})


def _size(record: Any) -> int:
    values = [item for value in record.values() for item in (value if isinstance(value, list) else [value])]
    return sum(len(item) if isinstance(item, bytes | str) else 8 for item in values)


def main() -> None:
    """Run one secure sum, and check it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    strategy, grid = Strategy(), Grid()
    legacy = LegacyContext(context(), strategy=strategy)
    legacy.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(1, np.float32)])
    legacy.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=2 * PARTIES // 3 + 1)
    started = time.perf_counter()
    workflow(grid, legacy)
    seconds = time.perf_counter() - started - grid.not_counted_s
    weights = np.arange(1, PARTIES + 1) / sum(range(1, PARTIES + 1))
    exact = sum(weight * grid.updates[number + 1][0] for number, weight in enumerate(weights))
    error = float(np.abs(strategy.mean[0] - exact).max())
    print(json.dumps({"seconds": seconds, "bytes_up": grid.bytes_up / PARTIES, "error": error}))


if __name__ == "__main__":
    main()
