"""What Flower's server does: FedAvg as it comes, the end of each round noted."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    results = Path(str(config["results"]))

    def note(server_round: int, arrays: ArrayRecord) -> None:
        """Append the time; Flower calls this before the first round and after each."""
        with results.open("a") as file:
            file.write(f"{time.time()}\n")

    draw = np.random.default_rng(0)
    tensors = [draw.standard_normal(int(config["values"]), dtype=np.float32) for _ in range(int(config["tensors"]))]
    parties = int(config["parties"])
    strategy = FedAvg(
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_train_nodes=parties,
        min_evaluate_nodes=parties,
        min_available_nodes=parties,
    )
    rounds = int(config["rounds"])
    result = strategy.start(grid, ArrayRecord(tensors), num_rounds=rounds, evaluate_fn=note)
    # Flower goes on without a client that failed; then the mean is another one.
    factor = np.mean([1.0 + 0.01 * (number + 1) for number in range(parties)])
    if np.allclose(result.arrays.to_numpy_ndarrays()[-1], tensors[-1] * factor**rounds, rtol=1e-4):
        with results.open("a") as file:
            file.write("right\n")
