"""Submits one job to a deployed FLARE and waits for its end; runs in FLARE's environment, in a folder of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.job_config.api import FedJob
from nvflare.recipe import ProdEnv
from nvflare.recipe.spec import Recipe


def fedavg(request: dict) -> Recipe:
    """Return FLARE's FedAvg recipe, all settings at their defaults."""
    from flare_model import Payload
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    return FedAvgRecipe(
        name="fedavg",
        model=Payload(request["tensors"], request["values"]),
        min_clients=request["parties"],
        num_rounds=request["rounds"],
        train_script="flare_client.py",
    )


def cell(request: dict) -> FedJob:
    """Return a job whose server calls the clients by FLARE's Cell, below its tasks."""
    from cell_call import Answerer, Caller

    job = FedJob(name="cell", min_clients=request["parties"])
    job.to_server(Caller(request["rounds"], request["values"] * 4, request["results"]))
    job.to_clients(Answerer(), tasks=["none"])
    return job


def collab(request: dict) -> Recipe:
    """Return a job whose server calls the clients by FLARE's Collab."""
    from collab_call import Hub, Site
    from nvflare.collab import CollabRecipe

    hub = Hub(request["rounds"], request["values"] * 4, request["results"])
    return CollabRecipe(job_name="collab", server=hub, client=Site(), min_clients=request["parties"])


KINDS: dict[str, Callable[[dict], FedJob | Recipe]] = {"fedavg": fedavg, "cell": cell, "collab": collab}


def connected(request: dict) -> Session:
    """Return a session with the server, once all clients have registered there."""
    while True:
        try:
            session = new_secure_session(request["user"], request["kit"], timeout=5.0)
            break
        except Exception as error:  # noqa: BLE001 - the server is still starting; the caller's timeout ends this
            print(f"no session yet: {type(error).__name__}", flush=True)
            time.sleep(0.5)
    while len(session.get_system_info().client_info) < request["parties"]:
        time.sleep(0.2)
    return session


def main() -> None:
    """Submit, and wait until the job has finished."""
    request = json.loads(sys.argv[1])
    session = connected(request)
    job = KINDS[request["kind"]](request)
    environment = ProdEnv(startup_kit_location=request["kit"], username=request["user"])
    job_id = job.execute(environment).get_job_id() if isinstance(job, Recipe) else environment.deploy(job)
    while not (status := session.get_job_status(job_id)) or not status.startswith("FINISHED"):
        time.sleep(1)
    # An open session would keep this process.
    session.close()
    print(status, flush=True)
    sys.exit(status != "FINISHED:COMPLETED")


if __name__ == "__main__":
    main()
