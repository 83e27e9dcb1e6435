"""The bare loop under Ray Train: `ray_train.py JOB.json` starts Ray, two workers, and ends both."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def train_loop(job: dict[str, Any]) -> None:
    """What each worker runs; Ray Train has joined the process group and set the ranks by then."""
    from bare_train import train

    train(job)


def main() -> None:
    """Run the job to its end."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    job = json.loads(Path(sys.argv[1]).read_text())
    # Ray puts Unix sockets below its folder; their paths may have 107 bytes, so it must be short.
    with tempfile.TemporaryDirectory(prefix="zfr-") as folder:
        # No dashboard: ours starts none either.
        ray.init(num_cpus=job["workers"], include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=job,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=job["workers"], resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="bare", storage_path=f"{folder}/results"),
        )
        trainer.fit()
        ray.shutdown()


if __name__ == "__main__":
    main()
