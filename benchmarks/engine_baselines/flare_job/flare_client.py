"""What a client does in a round of FLARE's FedAvg: no training, a changed copy of what it got."""

import nvflare.client as flare


def main() -> None:
    """Answer each round."""
    flare.init()
    factor = 1.0 + 0.01 * int(flare.get_site_name().split("-")[1])
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        flare.send(flare.FLModel(params={name: value * factor for name, value in model.params.items()}))


if __name__ == "__main__":
    main()
