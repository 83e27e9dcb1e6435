"""How long the simulator takes for a large cluster: 10,000 nodes and 30 days on one core by default.

python benchmarks/simulation.py --nodes 10000 --days 30
"""

import argparse
import json
import time

from launcher.orchestration.scenario import Scenario
from launcher.orchestration.simulator import expected_goodput, simulate
from launcher.recipe.run_sections import FaultToleranceSection


def main() -> None:
    """Simulate once, and print the time that took with the goodput and the closed formula's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--mtbf-node-days", type=float, default=154.0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    scenario = Scenario(
        options.nodes, options.mtbf_node_days, options.days, save_steps=30, save_seconds=1.0, start_seconds=30.0
    )
    settings = FaultToleranceSection(max_restarts=1000)
    began, cpu = time.perf_counter(), time.process_time()
    found = simulate(scenario, settings)
    restart = scenario.start_seconds + scenario.detect_seconds + scenario.teardown_seconds
    interval = scenario.save_steps * scenario.step_seconds
    facts = {
        "nodes": options.nodes,
        "days": options.days,
        "failures": found.failures,
        "events": len(found.events),
        "goodput": round(found.goodput, 4),
        "closed_formula": round(
            expected_goodput(options.nodes, 1 / options.mtbf_node_days, scenario.save_seconds, restart, interval), 4
        ),
        "wall_seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    print(json.dumps(facts, indent=1) if options.json else "\n".join(f"{key:<16}{facts[key]}" for key in facts))


if __name__ == "__main__":
    main()
