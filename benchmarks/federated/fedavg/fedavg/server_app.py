"""The server: Flower's FedAvg, which notes when a round ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .model import adapted

app = ServerApp()


class Timed(FedAvg):
    """Writes the time at which a round's updates are averaged."""

    def __init__(self, times: Path, **options: Any) -> None:
        super().__init__(**options)
        self._times = times

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        averaged = super().aggregate_train(server_round, replies)
        with self._times.open("a") as file:
            file.write(f"{time.time()}\n")
        return averaged


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    model = adapted(config)
    from peft import get_peft_model_state_dict

    initial = ArrayRecord({name: one.contiguous() for name, one in get_peft_model_state_dict(model).items()})
    strategy = Timed(Path(str(config["times"])), fraction_evaluate=0.0, min_available_nodes=2)
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(str(config["rounds"])))
