"""The conversations: one file per algorithm, both halves together. A new one is a file and a line in `SCENARIOS`."""

from fedllm.scenarios import fedhomollm, fedost
from fedllm.scenarios.base import Scenario

SCENARIOS: dict[str, Scenario] = {
    "FedHomoLLM": fedhomollm.SCENARIO,
    "FedOST": fedost.SCENARIO,
}
